"""Runs a whole benchmark: asks the mesh for its state, plans the stages, runs them, and computes the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Protocol

from gpumesh.bench.figures.gpu_meter import gpu_use, sample_gpus
from gpumesh.bench.figures.summary import StageResult, route_costs, scaling, summarize_stage
from gpumesh.bench.load.generator import Disturbance, run_interleaved, run_stage
from gpumesh.bench.load.routes import ApiKeys, http_route
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.results.result import BenchResult, describe_environment
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload import scenarios
from gpumesh.bench.workload.scenarios import NodeFacts, Plan
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import Stage, StageKind
from gpumesh.bench.workload.traces import TracedRequest
from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import BackendPhase, Finding, MeshState, NodeState
from gpumesh.topology import BackendKind

MESH, GATEWAY, TUNNEL = "mesh", "gateway", "tunnel"  # the names of the routes of the scenario ``overhead``


class BenchTarget(Protocol):
    """The measured mesh. For ``failover``, ``drain`` takes a node out of service and ``resume`` puts it back."""

    embedded: bool
    """Whether the mesh runs in this process."""

    def send(self) -> SendPrompt:
        """Returns the function that sends a request through the mesh."""
        ...

    async def status(self) -> MeshState:
        """Asks the mesh for its state."""
        ...

    async def drain(self, node: str) -> None: ...

    async def resume(self, node: str) -> None: ...


class ProgressReporter(Protocol):
    """Shows the progress of a run to a person who waits. The run calls these methods."""

    def set_plan(self, plan: Plan) -> None: ...

    def start_stage(self, stage: Stage) -> None: ...

    def add_record(self, record: LoadSample) -> None: ...


@dataclass(frozen=True, slots=True)
class BenchOutput:
    """What a run yields: its result, and the outcome of each request, those of the warm-up too."""

    result: BenchResult
    records: tuple[LoadSample, ...]


class DrainDisturbance:
    """The default disturbance: drains the busiest of ``nodes``. This is safe on hosts that other people use too."""

    def __init__(self, target: BenchTarget, nodes: Sequence[str]) -> None:
        self._target = target
        self._nodes = nodes
        self._drained_node: str | None = None

    async def begin(self) -> str:
        """Drains the node with the most requests in flight. Returns a description."""
        state = await self._target.status()
        candidates = [node for node in state.nodes if node.name in self._nodes]
        busiest = max(candidates, key=lambda node: node.load.in_flight)
        await self._target.drain(busiest.name)
        self._drained_node = busiest.name
        return f"{busiest.name} drained"

    async def end(self) -> None:
        """Puts the node back into service, if ``begin`` has drained a node."""
        if self._drained_node is not None:
            await self._target.resume(self._drained_node)
            self._drained_node = None


def usable_nodes(state: MeshState, model: str) -> list[NodeState]:
    """Returns the nodes that are up and have the model. A node whose models are unknown counts as having it."""
    return [node for node in state.nodes if _is_usable(node, model)]


def _is_usable(node: NodeState, model: str) -> bool:
    """Whether the node is up and has the model, or may have it."""
    is_up = node.health.is_serving and node.backend.state is BackendPhase.UP
    models = node.backend.models
    may_have_model = not models or has_model(models, model)  # no models: its list is unknown
    return is_up and may_have_model


def has_model(models: Sequence[str], model: str) -> bool:
    """Whether ``model`` is one of ``models``. As in Ollama, a name without a tag means ``:latest``."""
    if ":" not in model and f"{model}:latest" in models:
        return True
    return model in models


async def run_benchmark(
    target: BenchTarget,
    scenario: Scenario,
    settings: BenchSettings,
    *,
    progress: ProgressReporter,
    rng: Random,
    objective: Objective | None = None,
    trace: Sequence[TracedRequest] = (),
    disturbance: Disturbance | None = None,
    only_node: str | None = None,
    keys: ApiKeys | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> BenchOutput:
    """Runs a scenario and computes its result.

    ``rng`` makes the nonces of the prompts. ``objective`` is that of goodput (``None``: the default). ``trace`` is for
    ``replay`` only. ``disturbance``: for ``failover``, in the place of ``DrainDisturbance``. ``only_node``: measures
    one node as if it were the mesh. ``keys``: for the routes of ``overhead`` that start outside the mesh.

    Warm-up requests are recorded, but no figure includes them. Raises NoNodeError when no node can serve the model, and
    UsageError when the scenario cannot be run here.
    """
    objective = objective or Objective()
    started_at = now()
    state = await target.status()
    nodes = _select_nodes(usable_nodes(state, settings.model), only_node)
    if not nodes:
        raise _no_usable_node(state, settings.model, only_node)
    facts = [NodeFacts(node.name, node.load.limit) for node in nodes]
    plan = scenarios.plan_stages(scenario, settings, facts, rng=rng, trace=trace, routes=_count_routes(state))
    if only_node is not None:
        plan = _pin_to_node(plan, only_node)
    progress.set_plan(plan)
    if disturbance is None and scenario is Scenario.FAILOVER:
        disturbance = DrainDisturbance(target, [node.name for node in nodes])
    notes = _node_notes(nodes, state.findings)
    if only_node is None:  # with ``only_node``, the others are not measured because the person wants so: no note
        notes.extend(_exclusion_notes(state, nodes))
    stages: list[StageResult] = []
    records: list[LoadSample] = []
    for stage in plan.stages:
        progress.start_stage(stage)
        async with sample_gpus(target.status) as gpu_samples:
            if scenario is Scenario.OVERHEAD and stage.kind is StageKind.NODE:
                run = await _run_over_routes(target, stage, state, progress, keys or ApiKeys())
            else:
                run = await run_stage(
                    target.send(),
                    stage,
                    on_record=progress.add_record,
                    disturbance=disturbance if stage.disturb else None,
                )
        records.extend(run.records)
        if stage.kind is StageKind.WARM_UP:
            notes.extend(_warm_up_notes(run))
            continue
        measured_nodes = frozenset([stage.node]) if stage.node else frozenset(node.name for node in nodes)
        stages.extend(summarize_stage(run, objective, gpu_use(gpu_samples, measured_nodes)))
    notes.extend(f"stage {stage.name}: {stage.client.bound}" for stage in stages if stage.client.bound)
    result = BenchResult(
        at=started_at,
        scenario=scenario,
        settings=settings,
        objective=objective,
        environment=describe_environment(await target.status(), embedded=target.embedded),
        stages=tuple(stages),
        # Only these two scenarios measure each node alone and then the mesh.
        scaling=scaling(stages) if scenario in (Scenario.SCALE, Scenario.QUICK) else None,
        routes=route_costs(stages),
        notes=tuple(dict.fromkeys(notes)),  # each note once
    )
    return BenchOutput(result, tuple(records))


def _select_nodes(nodes: Sequence[NodeState], only_node: str | None) -> list[NodeState]:
    """The node ``only_node``, or all nodes if ``only_node`` is ``None``."""
    return [node for node in nodes if only_node is None or node.name == only_node]


def _no_usable_node(state: MeshState, model: str, only_node: str | None) -> NoNodeError | UsageError:
    """Makes the error for a run without a usable node: the reason of each node, or that there is no such node."""
    names = [node.name for node in state.nodes]
    if only_node is not None and only_node not in names:
        return UsageError(f"there is no node {only_node!r}", hint=f"the nodes are: {', '.join(names)}")
    candidates = _select_nodes(state.nodes, only_node)
    reasons = "; ".join(f"{node.name}: {_exclusion_reason(node)}" for node in candidates)
    return NoNodeError(f"no node can serve {model!r} ({reasons})")


def _exclusion_reason(node: NodeState) -> str:
    """The reason why a node that is not usable is not measured: the reason of its health, or that it lacks the model.

    If neither is known, it is the health itself, for example ``unknown``.
    """
    if node.reason:
        return node.reason
    return "no such model there" if node.backend.models else node.health.value


def _pin_to_node(plan: Plan, node: str) -> Plan:
    """The plan with each request sent to ``node``."""
    stages: list[Stage] = []
    for stage in plan.stages:
        requests = tuple(replace(planned, node=node) for planned in stage.requests)
        stages.append(replace(stage, requests=requests))
    return replace(plan, stages=tuple(stages))


def _node_notes(nodes: Sequence[NodeState], findings: Sequence[Finding]) -> list[str]:
    """The notes about the measured hosts that qualify the figures."""
    notes = []
    if any(node.simulated for node in nodes):
        notes.append("simulated hosts: the figures are the stand-in's, not a GPU's")
    notes.extend(finding.message for finding in findings if finding.code == "same-gpu")
    return notes


def _exclusion_notes(state: MeshState, measured: Sequence[NodeState]) -> list[str]:
    """A note for each node that is not measured, with the reason."""
    excluded_nodes = [node for node in state.nodes if node not in measured]
    return [f"{node.name} is not measured: {_exclusion_reason(node)}" for node in excluded_nodes]


def _warm_up_notes(run: StageRun) -> list[str]:
    """A note for each warm-up request that failed."""
    return [
        f"{record.node}: the warm-up request failed: {record.error}"
        for record in run.records
        if record.outcome is not SampleOutcome.SERVED
    ]


def _count_routes(state: MeshState) -> int:
    """The number of routes to each node that ``_run_over_routes`` uses."""
    return 3 if state.gateway.url is not None else 2


async def _run_over_routes(
    target: BenchTarget, stage: Stage, state: MeshState, progress: ProgressReporter, keys: ApiKeys
) -> StageRun:
    """Runs a stage of one node over several routes: the tunnel alone, the mesh, and the gateway if the gateway serves.

    Each request takes the next route. ``state`` is the mesh's state, with the URLs of the node and of the gateway.
    """
    node = state.node(stage.node or "")  # a stage of one node has its name
    async with AsyncExitStack() as stack:
        routes: list[tuple[str, SendPrompt]] = []  # the shortest route first: ``summary.route_costs`` compares with it
        assert node.backend.url is not None, "a node that is up has no URL"
        kind = BackendKind(node.backend.kind)
        tunnel = http_route(node.backend.url, kind, api_key=keys.nodes.get(node.name))
        routes.append((TUNNEL, await stack.enter_async_context(tunnel)))
        routes.append((MESH, target.send()))
        if state.gateway.url is not None:
            gateway = http_route(state.gateway.url, kind, through_gateway=True, api_key=keys.gateway)
            routes.append((GATEWAY, await stack.enter_async_context(gateway)))
        return await run_interleaved(routes, stage, on_record=progress.add_record)
