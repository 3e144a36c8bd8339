"""The benchmark's load generator: sends the requests of a stage, in a closed or open loop, and records each outcome.

A closed loop keeps a fixed number of requests in flight. An open loop sends each request at its intended moment,
whether or not earlier answers have come. Requests go through a ``SendPrompt``: a mesh in this process, a running mesh,
or a single server (``routes``). Cancelling a stage ends its requests, and so the generation on the hosts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from gpumesh.bench.load.answer_reading import AnswerReading
from gpumesh.bench.load.conditions import LoadConditions, Via
from gpumesh.bench.load.conversations import ConversationHistories
from gpumesh.bench.load.limits.load_meter import LoadMeter
from gpumesh.bench.load.limits.measured_conditions import measured_conditions
from gpumesh.bench.load.loops import send_all
from gpumesh.bench.load.samples import ClientLoad, LoadSample, StageRun
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.workload.stages import PlannedRequest, Stage
from gpumesh.errors import GPUMeshError, MeshNotRunning


class Disturbance(Protocol):
    """Takes a node out of service in the middle of a stage, and puts the node back."""

    async def begin(self) -> str:
        """Takes a node out of service. Returns what was done, for the result: "oslo drained"."""
        ...

    async def end(self) -> None:
        """Puts the node back into service."""
        ...


@dataclass(slots=True)
class RunningStage:
    """A stage while it runs. ``record_added`` is set after each answer; ``on_record`` is called for each answer."""

    stage: Stage
    clock: Callable[[], float]
    on_record: Callable[[LoadSample], None]
    start: float = 0.0  # on ``clock``
    records: list[LoadSample] = field(default_factory=list)
    decoded: list[LoadSample] = field(default_factory=list)  # the whole samples that the load generator's process sends
    histories: ConversationHistories = field(default_factory=ConversationHistories)
    record_added: asyncio.Event = field(default_factory=asyncio.Event)
    disturbance: str | None = None  # its description, as soon as it has begun
    disturbance_began_s: float | None = None
    disturbance_ended_s: float | None = None

    def begin(self) -> None:
        """Starts the clock."""
        self.start = self.clock()

    def now(self) -> float:
        """The time since the start of the stage, in seconds."""
        return self.clock() - self.start

    def add(self, record: LoadSample) -> None:
        """Keeps the outcome of a request that has ended, and reports it."""
        self.records.append(record)
        self.record_added.set()
        self.on_record(record)

    def complete(self, duration_s: float, client: ClientLoad, conditions: LoadConditions) -> StageRun:
        """Makes the stage's outcome, with the records in the order of the plan."""
        disturbed_s = None
        if self.disturbance_began_s is not None:
            # Without a time of its end, the disturbance was still being ended when the stage ended.
            ended_s = duration_s if self.disturbance_ended_s is None else self.disturbance_ended_s
            disturbed_s = (self.disturbance_began_s, ended_s)
        return StageRun(
            self.stage,
            tuple(sorted(self.records, key=lambda record: record.index)),
            duration_s,
            client,
            disturbed_s,
            self.disturbance,
            conditions,
            self.start,
        )

    def complete_here(self, duration_s: float, meter: LoadMeter) -> StageRun:
        """Makes the outcome of a stage whose requests were sent by this process."""
        client, conditions = measured_conditions(
            self.records, meter, via=Via.MESH, own_process=False, mesh_is_here=not meter.has_mesh_process
        )
        return self.complete(duration_s, client, conditions)


async def run_stage(
    send: SendPrompt,
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_record: Callable[[LoadSample], None] = lambda _: None,
    on_cut_short: Callable[[StageRun], None] = lambda _: None,
    disturbance: Disturbance | None = None,
    mesh_pid: int | None = None,
) -> StageRun:
    """Sends all requests of a stage and waits until they have ended. A failed request is a record, not an error.

    ``on_record`` is called for each request that has ended. ``on_cut_short`` gets what was measured until then when
    this function is cancelled or the mesh has gone. ``disturbance`` acts only in a stage with ``disturb``.
    ``mesh_pid`` is the process of the mesh, ``None`` if it is this one.

    Raises an ExceptionGroup with the error MeshNotRunning, or another error of its code, when the mesh has gone.
    """
    run = RunningStage(stage, clock, on_record)

    async def send_one(index: int) -> None:
        await _send_request(send, run, index, stage.requests[index])

    meter = LoadMeter(mesh_pid, clock)
    with _reported_if_cut_short(run, meter, on_cut_short):
        async with meter.measure(), asyncio.TaskGroup() as group:
            run.begin()
            helpers = []
            if stage.disturb and disturbance is not None:
                helpers.append(group.create_task(disturb_stage(run, disturbance)))
            try:
                await send_all(
                    send_one,
                    [planned.conversation for planned in stage.requests],
                    [planned.at_s for planned in stage.requests],
                    stage.concurrency,
                    until_s=stage.duration_s,
                    now=run.now,
                    think_s=stage.think_s,
                    sleep=sleep,
                )
                duration_s = run.now()
            finally:  # also after an error: the group waits for the disturbance
                for helper in helpers:
                    helper.cancel()
    return run.complete_here(duration_s, meter)


async def run_over_routes(
    routes: Mapping[str, SendPrompt],
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_record: Callable[[LoadSample], None] = lambda _: None,
    on_cut_short: Callable[[StageRun], None] = lambda _: None,
) -> StageRun:
    """Sends one request at a time, each over its own route.

    ``routes`` are the functions that send over the routes, by the names of the routes. ``on_cut_short``: see
    ``run_stage``.
    """
    run = RunningStage(stage, clock, on_record)
    meter = LoadMeter(None, clock)
    with _reported_if_cut_short(run, meter, on_cut_short):
        async with meter.measure():
            run.begin()
            for index, planned in enumerate(stage.requests):
                assert planned.route is not None, "each request of such a stage has a route"
                await _send_request(routes[planned.route], run, index, planned, route=planned.route)
            duration_s = run.now()
    return run.complete_here(duration_s, meter)


@contextmanager
def _reported_if_cut_short(
    run: RunningStage, meter: LoadMeter, on_cut_short: Callable[[StageRun], None]
) -> Iterator[None]:
    """Gives ``on_cut_short`` what there is of the stage when an error ends the block: Ctrl-C, or the mesh's end."""
    try:
        yield
    except BaseException:
        on_cut_short(run.complete_here(run.now(), meter))
        raise


async def _send_request(
    send: SendPrompt, run: RunningStage, index: int, planned: PlannedRequest, *, route: str | None = None
) -> None:
    """Sends one request, reads its answer, and adds a record of how it ended: a failure is recorded, not raised.

    A request that is cancelled, or whose mesh has gone, is recorded as unfinished, and the error is raised: then the
    stage ends.
    """
    sent_s = run.now()
    intended_s = sent_s if planned.at_s is None else planned.at_s
    reading = AnswerReading(keeps_text=planned.conversation is not None or run.stage.disturb)
    chat = run.histories.continue_chat(planned.conversation, planned.chat)
    node, attempts = planned.node, 0
    first_node: str | None = None
    error: GPUMeshError | None = None
    stage_end: BaseException | None = None  # what ends the whole stage
    try:
        async with send(chat, planned.node) as answer:
            try:
                async for chunk in answer:
                    reading.add(chunk, run.now())
                    if first_node is None:
                        first_node = answer.node
            finally:
                node = answer.node or node  # also if the answer is cut off here
            attempts = answer.attempts
    except GPUMeshError as raised:
        if raised.code == MeshNotRunning.code:
            stage_end = raised
        else:
            error = raised
            node = raised.node or node  # for a request to the mesh, only the error names the node
    except asyncio.CancelledError as cancelled:
        stage_end = cancelled
    run.histories.add_answer(planned.conversation, chat, reading.text)
    run.add(
        reading.make_sample(
            stage=run.stage.name,
            index=index,
            start_s=0.0,  # ``run.now`` counts from the start of the stage
            intended_s=intended_s,
            sent_s=sent_s,
            ended_s=run.now(),
            node=node,
            attempts=attempts,
            route=route,
            error=error,
            is_unfinished=stage_end is not None,
            first_node=first_node,
        )
    )
    if stage_end is not None:
        raise stage_end


async def disturb_stage(run: RunningStage, disturbance: Disturbance) -> None:
    """Begins the disturbance after a third of the answers, and ends it after two thirds, or when the stage ends."""
    total = len(run.stage.requests)
    await _wait_for_records(run, total // 3)
    began_s = run.now()  # what the disturbance breaks, it breaks before ``begin`` returns
    run.disturbance = await disturbance.begin()
    run.disturbance_began_s = began_s
    try:
        await _wait_for_records(run, 2 * total // 3)
    finally:
        # Also when the end of the stage cancels this function: the node must not stay out of service.
        run.disturbance_ended_s = run.now()
        await disturbance.end()


async def _wait_for_records(run: RunningStage, count: int) -> None:
    """Waits until ``count`` requests have ended."""
    while len(run.records) < count:
        run.record_added.clear()
        await run.record_added.wait()
