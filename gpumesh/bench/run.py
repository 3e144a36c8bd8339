"""Runs a whole benchmark: asks the mesh for its state, plans the stages, runs them, and computes the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Protocol

from gpumesh.bench import scenarios
from gpumesh.bench.gpu_meter import gpu_use, sample_gpus
from gpumesh.bench.load import (
    Disturbance,
    LoadSample,
    SampleOutcome,
    SendPrompt,
    StageRun,
    run_interleaved,
    run_stage,
)
from gpumesh.bench.result import BenchResult, describe_environment
from gpumesh.bench.routes import ApiKeys, http_route
from gpumesh.bench.scenarios import BenchSettings, NodeFacts, Plan, Scenario, Stage, StageKind
from gpumesh.bench.stats import Objective
from gpumesh.bench.summary import StageResult, route_costs, scaling, summarize_stage
from gpumesh.bench.traces import TracedRequest
from gpumesh.errors import NoNodeError, UsageError
from gpumesh.state import BackendPhase, Finding, Health, MeshState, NodeState
from gpumesh.topology import BackendKind

MESH, GATEWAY, TUNNEL = "mesh", "gateway", "tunnel"


class BenchTarget(Protocol):
    """The measured mesh. ``embedded``: it runs in this process. ``send`` returns a ``load.SendPrompt``. ``drain`` and
    ``resume`` are used by the scenario ``failover`` only."""

    embedded: bool

    def send(self) -> SendPrompt: ...

    async def status(self) -> MeshState: ...

    async def drain(self, node: str) -> None: ...

    async def resume(self, node: str) -> None: ...


class ProgressReporter(Protocol):
    """Receives the progress of a run, to show it to a waiting person."""

    def set_plan(self, plan: Plan) -> None: ...

    def start_stage(self, stage: Stage) -> None: ...

    def add_record(self, record: LoadSample) -> None: ...


@dataclass(frozen=True, slots=True)
class BenchOutput:
    result: BenchResult
    records: tuple[LoadSample, ...]


class DrainDisturbance:
    """The default disturbance: drains the busiest node. This is safe on hosts that other people use."""

    def __init__(self, target: BenchTarget, nodes: Sequence[str]) -> None:
        self._target = target
        self._nodes = nodes
        self._drained: str | None = None

    async def begin(self) -> str:
        state = await self._target.status()
        busiest = max((node for node in state.nodes if node.name in self._nodes), key=lambda node: node.load.in_flight)
        await self._target.drain(busiest.name)
        self._drained = busiest.name
        return f"{busiest.name} drained"

    async def end(self) -> None:
        if self._drained is not None:
            await self._target.resume(self._drained)
            self._drained = None


def usable_nodes(state: MeshState, model: str) -> list[NodeState]:
    """The nodes that are up and have the model, or whose models are unknown."""
    return [
        node
        for node in state.nodes
        if node.health in (Health.HEALTHY, Health.DEGRADED)
        and node.backend.state is BackendPhase.UP
        and (not node.backend.models or has_model(node.backend.models, model))
    ]


def has_model(models: Sequence[str], model: str) -> bool:
    """Whether ``models`` has ``model``. As in Ollama, a name without a tag means ``:latest``."""
    return model in models or (":" not in model and f"{model}:latest" in models)


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
    """Runs a scenario and computes its result. Raises NoNodeError when no node can serve the model, UsageError when the
    scenario cannot be run here.

    ``only_node`` measures one node as if it were the mesh. Warm-up requests are recorded, but no figure includes them.
    """
    objective = objective or Objective()
    started_at = now()
    state = await target.status()
    nodes = [node for node in usable_nodes(state, settings.model) if only_node in (None, node.name)]
    if not nodes:
        raise _no_usable_node(state, settings.model, only_node)
    facts = [NodeFacts(node.name, node.load.limit) for node in nodes]
    plan = scenarios.plan_stages(scenario, settings, facts, rng=rng, trace=trace, routes=_count_routes(state))
    if only_node is not None:
        plan = _pin_to_node(plan, only_node)
    progress.set_plan(plan)
    if disturbance is None and scenario is Scenario.FAILOVER:
        disturbance = DrainDisturbance(target, [node.name for node in nodes])
    stages: list[StageResult] = []
    records: list[LoadSample] = []
    notes: list[str] = _node_notes(nodes, state.findings)
    if only_node is None:
        excluded = (node for node in state.nodes if node not in nodes)
        notes.extend(f"{node.name} is not measured: {_exclusion_reason(node)}" for node in excluded)
    for stage in plan.stages:
        progress.start_stage(stage)
        async with sample_gpus(target.status) as samples:
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
        stages.extend(summarize_stage(run, objective, gpu_use(samples, measured_nodes)))
    notes.extend(f"stage {stage.name}: {stage.client.bound}" for stage in stages if stage.client.bound)
    return BenchOutput(
        BenchResult(
            at=started_at,
            scenario=scenario,
            settings=settings,
            objective=objective,
            environment=describe_environment(await target.status(), embedded=target.embedded),
            stages=tuple(stages),
            scaling=scaling(stages) if scenario in (Scenario.SCALE, Scenario.QUICK) else None,
            routes=route_costs(stages),
            notes=tuple(dict.fromkeys(notes)),
        ),
        tuple(records),
    )


def _no_usable_node(state: MeshState, model: str, only_node: str | None) -> NoNodeError | UsageError:
    if only_node is not None and all(node.name != only_node for node in state.nodes):
        names = ", ".join(node.name for node in state.nodes)
        return UsageError(f"there is no node {only_node!r}", hint=f"the nodes are: {names}")
    candidates = [node for node in state.nodes if only_node in (None, node.name)]
    reasons = "; ".join(f"{node.name}: {_exclusion_reason(node)}" for node in candidates)
    return NoNodeError(f"no node can serve {model!r} ({reasons})")


def _exclusion_reason(node: NodeState) -> str:
    return node.reason or ("no such model there" if node.backend.models else node.health.value)


def _pin_to_node(plan: Plan, node: str) -> Plan:
    return replace(
        plan,
        stages=tuple(
            replace(stage, requests=tuple(replace(planned, node=node) for planned in stage.requests))
            for stage in plan.stages
        ),
    )


def _node_notes(nodes: Sequence[NodeState], findings: Sequence[Finding]) -> list[str]:
    notes = []
    if any(node.simulated for node in nodes):
        notes.append("simulated hosts: the figures are the stand-in's, not a GPU's")
    notes.extend(finding.message for finding in findings if finding.code == "same-gpu")
    return notes


def _warm_up_notes(run: StageRun) -> list[str]:
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
    """Runs a stage over the tunnel alone, the mesh, and the gateway if it serves. Each request takes the next route."""
    node = state.node(stage.node or "")
    async with AsyncExitStack() as stack:
        routes: list[tuple[str, SendPrompt]] = []
        assert node.backend.url is not None, "a node that is up has the route that it is up on"
        kind = BackendKind(node.backend.kind)
        tunnel = http_route(node.backend.url, kind, api_key=keys.nodes.get(node.name))
        routes.append((TUNNEL, await stack.enter_async_context(tunnel)))
        routes.append((MESH, target.send()))
        if state.gateway.url is not None:
            gateway = http_route(state.gateway.url, kind, through_gateway=True, api_key=keys.gateway)
            routes.append((GATEWAY, await stack.enter_async_context(gateway)))
        return await run_interleaved(routes, stage, on_record=progress.add_record)
