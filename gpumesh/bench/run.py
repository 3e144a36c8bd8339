"""A whole benchmark: looks at the mesh, plans, runs stage after stage, and computes the result."""

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
    RequestOutcome,
    RequestRecord,
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
    """The mesh that is measured. ``send`` as in ``load``; ``drain`` and ``resume`` serve the failover scenario."""

    embedded: bool

    def send(self) -> SendPrompt: ...

    async def status(self) -> MeshState: ...

    async def drain(self, node: str) -> None: ...

    async def resume(self, node: str) -> None: ...


class ProgressReporter(Protocol):
    """Told what happens meanwhile, for a person who waits."""

    def set_plan(self, plan: Plan) -> None: ...

    def start_stage(self, stage: Stage) -> None: ...

    def add_record(self, record: RequestRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class BenchOutput:
    result: BenchResult
    records: tuple[RequestRecord, ...]


class DrainDisturbance:
    """The default disturbance: drains the busiest node, which is safe on hosts that somebody needs."""

    def __init__(self, target: BenchTarget, nodes: Sequence[str]) -> None:
        self._target = target
        self._nodes = nodes
        self._drained: str | None = None

    async def begin(self) -> str:
        state = await self._target.status()
        chosen = max((node for node in state.nodes if node.name in self._nodes), key=lambda node: node.load.in_flight)
        await self._target.drain(chosen.name)
        self._drained = chosen.name
        return f"{chosen.name} drained"

    async def end(self) -> None:
        if self._drained is not None:
            await self._target.resume(self._drained)
            self._drained = None


def usable_nodes(state: MeshState, model: str) -> list[NodeState]:
    """The nodes that are up and have the model (or could not say what they have)."""
    return [
        node
        for node in state.nodes
        if node.health in (Health.HEALTHY, Health.DEGRADED)
        and node.backend.state is BackendPhase.UP
        and (not node.backend.models or has_model(node.backend.models, model))
    ]


def has_model(models: Sequence[str], model: str) -> bool:
    """As Ollama reads names: without a tag it means ``:latest``."""
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
    """Raises NoNodeError when no node can serve the model, UsageError when the scenario cannot be run here.

    ``only_node`` measures one node as if it were the mesh. Warm-up requests are written down, but not part of any
    figure.
    """
    objective = objective or Objective()
    at = now()
    state = await target.status()
    found = [node for node in usable_nodes(state, settings.model) if only_node in (None, node.name)]
    if not found:
        raise _nobody(state, settings.model, only_node)
    facts = [NodeFacts(node.name, node.load.limit) for node in found]
    plan = scenarios.plan_stages(scenario, settings, facts, rng=rng, trace=trace, routes=_routes(state))
    if only_node is not None:
        plan = _pinned(plan, only_node)
    progress.set_plan(plan)
    if disturbance is None and scenario is Scenario.FAILOVER:
        disturbance = DrainDisturbance(target, [node.name for node in found])
    stages: list[StageResult] = []
    records: list[RequestRecord] = []
    notes: list[str] = _notes(found, state.findings)
    if only_node is None:
        left_out = (node for node in state.nodes if node not in found)
        notes.extend(f"{node.name} is not measured: {_why_not(node)}" for node in left_out)
    for stage in plan.stages:
        progress.start_stage(stage)
        async with sample_gpus(target.status) as samples:
            if scenario is Scenario.OVERHEAD and stage.kind is StageKind.NODE:
                done = await _over_routes(target, stage, state, progress, keys or ApiKeys())
            else:
                done = await run_stage(
                    target.send(),
                    stage,
                    on_record=progress.add_record,
                    disturbance=disturbance if stage.disturb else None,
                )
        records.extend(done.records)
        if stage.kind is StageKind.WARM_UP:
            notes.extend(_warm_up_notes(done))
            continue
        nodes = frozenset([stage.node]) if stage.node else frozenset(node.name for node in found)
        stages.extend(summarize_stage(done, objective, gpu_use(samples, nodes)))
    notes.extend(f"stage {stage.name}: {stage.client.bound}" for stage in stages if stage.client.bound)
    return BenchOutput(
        BenchResult(
            at=at,
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


def _nobody(state: MeshState, model: str, only: str | None) -> NoNodeError | UsageError:
    if only is not None and all(node.name != only for node in state.nodes):
        return UsageError(f"there is no node {only!r}", hint=f"the nodes are: {', '.join(n.name for n in state.nodes)}")
    reasons = "; ".join(f"{node.name}: {_why_not(node)}" for node in state.nodes if only in (None, node.name))
    return NoNodeError(f"no node can serve {model!r} ({reasons})")


def _why_not(node: NodeState) -> str:
    return node.reason or ("no such model there" if node.backend.models else node.health.value)


def _pinned(plan: Plan, node: str) -> Plan:
    return replace(
        plan,
        stages=tuple(
            replace(stage, requests=tuple(replace(planned, node=node) for planned in stage.requests))
            for stage in plan.stages
        ),
    )


def _notes(nodes: Sequence[NodeState], findings: Sequence[Finding]) -> list[str]:
    notes = []
    if any(node.simulated for node in nodes):
        notes.append("simulated hosts: the figures are the stand-in's, not a GPU's")
    notes.extend(finding.message for finding in findings if finding.code == "same-gpu")
    return notes


def _warm_up_notes(done: StageRun) -> list[str]:
    return [
        f"{record.node}: the warm-up request failed: {record.error}"
        for record in done.records
        if record.outcome is not RequestOutcome.SERVED
    ]


def _routes(state: MeshState) -> int:
    """How many ways ``_over_routes`` has to each node."""
    return 3 if state.gateway.url is not None else 2


async def _over_routes(
    target: BenchTarget, stage: Stage, state: MeshState, progress: ProgressReporter, keys: ApiKeys
) -> StageRun:
    """Through the tunnel alone, the mesh, and the gateway where one serves; each request over each in turn."""
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
