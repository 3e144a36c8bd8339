"""Runs the stages that a scenario asks for: over the mesh, or over all routes to a node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol

from gpumesh.bench.failover.failover_run import run_failover
from gpumesh.bench.failover.outage_disturbance import OutageDisturbance
from gpumesh.bench.figures.answers.answer import read_answers
from gpumesh.bench.figures.gpu_meter import GpuSample, gpu_use, sample_gpus
from gpumesh.bench.figures.node_shares import ColdStart, find_cold_starts
from gpumesh.bench.figures.notes.coverage_notes import cold_start_notes
from gpumesh.bench.figures.outages.failover import FailoverFigures
from gpumesh.bench.figures.outages.node_events import NodeEvent, node_events
from gpumesh.bench.figures.routes.route_differences import RouteDifference, route_differences
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.generator import run_over_routes, run_stage
from gpumesh.bench.load.load_sources import LoadOfThisProcess, LoadSource
from gpumesh.bench.load.route_arms import RouteAccess, open_routes, routes_to
from gpumesh.bench.load.routes import http_route
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.scenarios.base import NodeFacts, StageOutcome
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import Stage, StageKind
from gpumesh.errors import BackendUnreachable, GPUMeshError, MeshNotRunning, StreamCut
from gpumesh.mesh.outages.outage import Outage
from gpumesh.state import MeshState
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendKind


class BenchTarget(Protocol):
    """The measured mesh."""

    embedded: bool
    """Whether the mesh runs in this process."""

    def send(self) -> SendPrompt:
        """Returns the function that sends a request through the mesh."""
        ...

    async def status(self) -> MeshState:
        """Asks the mesh for its state."""
        ...

    def watch(self, interval_s: float) -> AsyncIterator[MeshState]:
        """Yields the state of the mesh, and again after changes, at most once in ``interval_s`` seconds."""
        ...

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:
        """Takes a node out of service during the block (``Session.hold``)."""
        ...


class ProgressReporter(Protocol):
    """Shows the progress of a run to a person who waits. The run calls these methods.

    How many stages will follow is not known before the last one, because a scenario decides by what it has measured.
    """

    def start_stage(self, stage: Stage) -> None: ...

    def add_record(self, record: LoadSample) -> None: ...


class StageRunner:
    """Runs the stages that a scenario asks for, one after another, and keeps their figures and records.

    ``nodes`` are the names of the measured nodes. ``only_node``: every request goes to this node.
    ``disturbance`` takes a node out of service in a stage that is to be disturbed. ``load`` sends the requests;
    ``None``: this process does, through the target. ``model`` is the measured model.
    """

    def __init__(
        self,
        target: BenchTarget,
        nodes: Sequence[str],
        objective: Objective,
        progress: ProgressReporter,
        disturbance: OutageDisturbance | None,
        access: RouteAccess,
        only_node: str | None,
        load: LoadSource | None = None,
        *,
        model: str,
    ) -> None:
        self._target = target
        self._nodes = nodes
        self._objective = objective
        self._progress = progress
        self._disturbance = disturbance
        self._access = access
        self._only_node = only_node
        self._model = full_name(model)
        self._load = load or LoadOfThisProcess(target.send())
        self.last_state: MeshState | None = None  # the latest state of the mesh that a stage has seen
        self.via = self._load.via
        self.results: list[StageResult] = []
        self.route_differences: list[RouteDifference] = []
        self.failover: FailoverFigures | None = None
        self.records: list[LoadSample] = []
        self.notes: list[str] = []
        self.cold_starts: list[ColdStart] = []

    def node_facts(self, state: MeshState) -> tuple[NodeFacts, ...]:
        """The measured nodes as they are in this state of the mesh.

        The limit is that of the measured model. If it is not known, it is the largest limit of any model there.
        """
        facts, has_gateway = [], state.gateway.url is not None
        for node in state.nodes:
            if node.name in self._nodes:
                loaded = tuple(model.name for model in node.backend.loaded)
                slots = next((learned.slots for learned in node.learned if learned.model == self._model), None)
                routes = routes_to(node, has_gateway=has_gateway, access=self._access)
                facts.append(NodeFacts(node.name, node.load.limit if slots is None else slots, loaded, routes))
        return tuple(facts)

    async def measure(self, stage: Stage) -> StageOutcome:
        """Runs a stage, keeps its records, and returns its figures; a warm-up has none.

        The figures of a ramp are only for the scenario, so they are not kept. A stage that is measured again takes the
        place of its earlier result; the records of all its tries are kept, with the number of the try.

        If the stage is cancelled, or the mesh ends, what was measured until then is kept, and the error is raised.
        """
        if self._only_node is not None:
            stage = _pin_to_node(stage, self._only_node)
        self._progress.start_stage(stage)
        state = self.last_state = await self._target.status()
        runs: list[StageRun] = []  # at most one: the stage, or what was measured of it until it was ended early
        gpu_samples: list[GpuSample] = []
        try:
            async with sample_gpus(self._target.status) as gpu_samples:
                runs.append(await self._run(stage, state, runs.append))
        except BaseException as raised:
            error = _first_of(raised) if isinstance(raised, BaseExceptionGroup) else raised
            for run in runs:
                self._keep(_without_lost_requests(run, error), gpu_samples, partial=True)
            raise error from None
        results = self._keep(runs[-1], gpu_samples)
        self.last_state = await self._target.status()
        return StageOutcome(results, self.node_facts(state), self.node_facts(self.last_state), runs[-1].duration_s)

    def _keep(
        self, run: StageRun, gpu_samples: Sequence[GpuSample], *, partial: bool = False
    ) -> tuple[StageResult, ...]:
        """Keeps the records of a stage and its figures, and returns the figures; a warm-up has none."""
        stage = run.stage
        if stage.node is not None:  # a server that belongs to no mesh does not say its name
            named = (replace(record, node=record.node or stage.node) for record in run.records)
            run = replace(run, records=tuple(named))
        label = stage.name if stage.attempt == 1 else f"{stage.name} (try {stage.attempt})"
        self.records.extend(replace(record, stage=label) for record in run.records)
        cold_starts = find_cold_starts(read_answers(run.records))
        self.cold_starts.extend(cold_starts)
        if stage.kind in (StageKind.WARM_UP, StageKind.CAPACITY):
            self.notes.extend(_failure_notes(run))
        else:
            self.notes.extend(cold_start_notes(cold_starts))
        if stage.kind is StageKind.WARM_UP:
            return ()
        measured_nodes = frozenset([stage.node] if stage.node else self._nodes)
        events = tuple(node_events(gpu_samples, sorted(measured_nodes), run.start_s))
        self.notes.extend(self._event_notes(label, events))
        results = [
            replace(result, partial=partial, node_events=events)
            for result in summarize_stage(run, self._objective, gpu_use(gpu_samples, measured_nodes))
            if result.requests  # none, if the stage was ended before its first answer began
        ]
        if stage.kind is not StageKind.CAPACITY and not (partial and stage.attempt > 1):  # an earlier try is whole
            names = [result.name for result in self.results]
            is_again = stage.attempt > 1 and stage.name in names
            place = names.index(stage.name) if is_again else len(names)
            self.results[place : place + 1] = results
            self.route_differences.extend(route_differences(run))
        return tuple(results)

    async def _run(self, stage: Stage, state: MeshState, on_cut_short: Callable[[StageRun], None]) -> StageRun:
        """Sends the requests of a stage over its routes, or through the mesh."""
        if stage.over_routes:
            node = state.node(stage.node or "")  # a stage of one node has its name
            async with open_routes(node, state, self._target.send(), self._access) as routes:
                return await run_over_routes(
                    routes, stage, on_record=self._progress.add_record, on_cut_short=on_cut_short
                )
        if stage.direct:
            async with _open_tunnel_route(state, stage, self._access) as send:
                return await run_stage(send, stage, on_record=self._progress.add_record, on_cut_short=on_cut_short)
        nodes = [node for node in state.nodes if node.name in self._nodes]
        disturbance = self._disturbance if stage.disturb else None

        async def run_load() -> StageRun:
            return await self._load.run(
                stage,
                nodes,
                state,
                on_record=self._progress.add_record,
                on_cut_short=on_cut_short,
                disturbance=disturbance,
            )

        if disturbance is None:
            return await run_load()
        failover = await run_failover(self._target, disturbance, run_load)
        self.failover = failover.figures
        return failover.run

    def _event_notes(self, label: str, events: Sequence[NodeEvent]) -> list[str]:
        """A note for each node that did not serve for a part of a stage, unless this benchmark took it out."""
        times = None if self._disturbance is None else self._disturbance.times
        taken_out = None if times is None else times.node
        return [f"stage {label}: {event.describe()}" for event in events if event.node != taken_out]


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a person should see, of those that ended a stage together: one that was raised on purpose before
    any other."""
    expected = group.subgroup(GPUMeshError) or group
    first = expected.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _without_lost_requests(run: StageRun, error: BaseException) -> StageRun:
    """The stage as it was measured until ``error`` ended it. If the mesh has gone, the requests to which it gave no
    answer are unfinished: they have not failed."""
    if not isinstance(error, GPUMeshError) or error.code != MeshNotRunning.code:
        return run
    lost = (BackendUnreachable.code, StreamCut.code)
    records = [
        replace(record, outcome=SampleOutcome.UNFINISHED, error=None, error_code=None)
        if record.error_code in lost
        else record
        for record in run.records
    ]
    return replace(run, records=tuple(records))


def _pin_to_node(stage: Stage, node: str) -> Stage:
    """The stage with each request sent to ``node``."""
    return replace(stage, requests=tuple(replace(planned, node=node) for planned in stage.requests))


def _failure_notes(run: StageRun) -> list[str]:
    """A note for each request of a warm-up or a ramp that failed."""
    request_name = "a request of its ramp" if run.stage.kind is StageKind.CAPACITY else "the warm-up request"
    return [
        f"{record.node}: {request_name} failed: {record.error}" for record in run.records if record.error is not None
    ]


def _open_tunnel_route(state: MeshState, stage: Stage, access: RouteAccess) -> AbstractAsyncContextManager[SendPrompt]:
    """The route to the server of the stage's node through its tunnel alone."""
    node = state.node(stage.node or "")
    assert node.backend.url is not None, "a node that is up has no URL"
    return http_route(node.backend.url, BackendKind(node.backend.kind), api_key=access.keys.nodes.get(node.name))
