"""The load generator: sends the requests of a stage and records the outcome of each.

A closed loop keeps a fixed number of requests in flight. An open loop sends each request at its intended moment,
whether or not earlier answers have come. Requests go through a ``SendPrompt``: a mesh in this process, a running mesh,
or a single server (``routes``). Cancelling a stage ends its requests, and so the generation on the hosts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from gpumesh.backends.base import ChatRequest, Chunk, ServerCounters
from gpumesh.bench.scenarios import PlannedRequest, Stage
from gpumesh.bench.stats import percentile
from gpumesh.errors import GPUMeshError, StreamCut

LAG_SAMPLE_S = 0.02
# Above these values the figures describe this machine rather than the mesh.
BUSY_CLIENT_CPU = 0.85  # of one core
LATE_CLIENT_MS = 5.0
MAX_LATE_SHARE = 0.01  # of an open loop's requests: so few do not move a median


class AnswerStream(Protocol):
    """An answer while it arrives. ``node`` and ``attempts`` are known once the first piece has arrived."""

    @property
    def node(self) -> str | None: ...

    @property
    def attempts(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class SendPrompt(Protocol):
    """Sends a prompt to ``node``; for ``None`` the mesh chooses the node. Raises GPUMeshError. Leaving the context
    early cancels the request."""

    def __call__(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]: ...


class Disturbance(Protocol):
    """Takes a node out of service in mid-run and puts it back. ``begin`` returns a description of what it did."""

    async def begin(self) -> str: ...

    async def end(self) -> None: ...


class SampleOutcome(StrEnum):
    """How a request ended, as the client of a benchmark sees it."""

    SERVED = "served"
    FAILED = "failed"
    CUT = "cut"
    """The answer began and did not reach its end."""


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The outcome of one request. Times are seconds since the start of the stage. ``arrivals_s`` has one time for each
    piece of the answer. ``intended_s`` is when an open loop should have sent the request, ``sent_s`` when it was sent.

    ``tokens`` is the server's own count, or the number of pieces if the server gave no count (``counted_pieces``).
    """

    stage: str
    index: int
    outcome: SampleOutcome
    intended_s: float
    sent_s: float
    ended_s: float
    node: str | None = None
    attempts: int = 0
    route: str | None = None
    arrivals_s: tuple[float, ...] = ()
    tokens: int | None = None
    counted_pieces: bool = False
    prompt_tokens: int | None = None
    counters: ServerCounters | None = None
    done_reason: str | None = None
    error_code: str | None = None
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        """Counted from the intended moment of sending."""
        return (self.arrivals_s[0] - self.intended_s) * 1000.0 if self.arrivals_s else None

    @property
    def end_to_end_ms(self) -> float | None:
        return (self.ended_s - self.intended_s) * 1000.0 if self.outcome is SampleOutcome.SERVED else None

    @property
    def last_token_ms(self) -> float | None:
        return (self.arrivals_s[-1] - self.intended_s) * 1000.0 if self.arrivals_s else None


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """How busy this process was while it measured: CPU time ÷ wall time (1 is one core), and the lag of its event loop.

    ``bound`` is the reason why the client itself limited the figures, as a sentence; ``None`` if it did not.
    """

    cpu: float
    lag_p99_ms: float
    late_sends: int = 0
    bound: str | None = None


@dataclass(frozen=True, slots=True)
class StageRun:
    """A stage as it was run. ``disturbed_s`` is when the disturbance began and ended, ``disturbance`` what it did."""

    stage: Stage
    records: tuple[LoadSample, ...]
    duration_s: float
    client: ClientLoad
    disturbed_s: tuple[float, float] | None = None
    disturbance: str | None = None


def judge_client(cpu: float, lags_ms: Sequence[float], late_sends: int, sends: int) -> ClientLoad:
    """Judges whether the client itself limited the figures. Pure. ``late_sends``: requests of an open loop that were
    sent more than LATE_CLIENT_MS after their moment."""
    ordered = sorted(lags_ms)
    # The 90th percentile: a single pause of the machine is no reason to doubt all figures.
    lag_p90_ms = percentile(ordered, 0.9) if ordered else 0.0
    bound = None
    if cpu >= BUSY_CLIENT_CPU:
        bound = f"this process used {cpu:.0%} of a core: the load generator may be what limits"
    elif lag_p90_ms >= LATE_CLIENT_MS:
        bound = f"this process often ran {lag_p90_ms:.0f} ms late: something else uses this machine's cores"
    elif sends and late_sends / sends > MAX_LATE_SHARE:
        bound = f"{late_sends} of {sends} requests went out late: the load generator could not keep up"
    return ClientLoad(cpu, percentile(ordered, 0.99) if ordered else 0.0, late_sends, bound)


@dataclass(slots=True)
class _Run:
    """The state of a stage while it runs. ``progress`` is set after each answer."""

    stage: Stage
    clock: Callable[[], float]
    on_record: Callable[[LoadSample], None]
    start: float = 0.0
    records: list[LoadSample] = field(default_factory=list)
    late_sends: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return self.clock() - self.start

    def add(self, record: LoadSample) -> None:
        self.records.append(record)
        self.progress.set()
        self.on_record(record)


async def run_stage(
    send: SendPrompt,
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_record: Callable[[LoadSample], None] = lambda _: None,
    disturbance: Disturbance | None = None,
) -> StageRun:
    """Sends all requests of a stage and waits until they have ended. A failed request is a record, not an error."""
    run = _Run(stage, clock, on_record)
    lags: list[float] = []
    disturbances: list[str] = []
    disturbed_s: list[float] = []  # the start of the disturbance, then its end
    cpu_start_s = time.process_time()
    run.start = clock()
    async with asyncio.TaskGroup() as group:
        helpers = [group.create_task(_measure_lag(lags, clock))]
        if stage.disturb and disturbance is not None:
            helpers.append(group.create_task(_disturb(run, disturbance, disturbances, disturbed_s)))
        try:
            if stage.concurrency is None:
                await _open_loop(send, run, sleep)
            else:
                await _closed_loop(send, run, stage.concurrency)
            duration_s = run.now()
            cpu_s = time.process_time() - cpu_start_s
        finally:
            for helper in helpers:
                helper.cancel()
    if len(disturbed_s) == 1:  # the stage ended while the disturbance was being ended
        disturbed_s.append(duration_s)
    records = tuple(sorted(run.records, key=lambda record: record.index))
    return StageRun(
        stage,
        records,
        duration_s,
        judge_client(cpu_s / duration_s if duration_s > 0 else 0.0, lags, run.late_sends, len(records)),
        (disturbed_s[0], disturbed_s[1]) if disturbed_s else None,
        disturbances[0] if disturbances else None,
    )


async def run_interleaved(
    routes: Sequence[tuple[str, SendPrompt]],
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_record: Callable[[LoadSample], None] = lambda _: None,
) -> StageRun:
    """Sends one request at a time and changes the route after each, so that drift affects all routes alike.

    A round has one request for each route. Each round begins with another route, so that no route is always first.
    """
    run = _Run(stage, clock, on_record)
    lags: list[float] = []
    cpu_start_s = time.process_time()
    run.start = clock()
    async with asyncio.TaskGroup() as group:
        lag_task = group.create_task(_measure_lag(lags, clock))
        try:
            for index, planned in enumerate(stage.requests):
                round_number, position = divmod(index, len(routes))
                name, send = routes[(position + round_number) % len(routes)]
                await _send_request(send, run, index, planned, route=name)
            duration_s = run.now()
            cpu_s = time.process_time() - cpu_start_s
        finally:
            lag_task.cancel()
    client = judge_client(cpu_s / duration_s if duration_s > 0 else 0.0, lags, 0, len(run.records))
    return StageRun(stage, tuple(run.records), duration_s, client)


async def _closed_loop(send: SendPrompt, run: _Run, concurrency: int) -> None:
    """Sends with ``concurrency`` workers. Each sends its next request when its last answer has ended."""
    unsent: Iterator[tuple[int, PlannedRequest]] = iter(enumerate(run.stage.requests))

    async def worker() -> None:
        for index, planned in unsent:
            await _send_request(send, run, index, planned)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(run.stage.requests))):
            group.create_task(worker())


async def _open_loop(send: SendPrompt, run: _Run, sleep: Callable[[float], Awaitable[None]]) -> None:
    """Sends each request at its own time, whether or not earlier answers have come."""
    async with asyncio.TaskGroup() as group:
        for index, planned in sorted(enumerate(run.stage.requests), key=lambda pair: pair[1].at_s or 0.0):
            wait_s = (planned.at_s or 0.0) - run.now()
            if wait_s > 0:
                await sleep(wait_s)
            group.create_task(_send_request(send, run, index, planned))


async def _send_request(
    send: SendPrompt, run: _Run, index: int, planned: PlannedRequest, *, route: str | None = None
) -> None:
    """Sends one request and records how it ended."""
    sent_s = run.now()
    intended_s = sent_s if planned.at_s is None else planned.at_s
    if (sent_s - intended_s) * 1000.0 > LATE_CLIENT_MS:
        run.late_sends += 1
    arrivals_s: list[float] = []
    counters: ServerCounters | None = None
    done_reason: str | None = None
    node, attempts = planned.node, 0
    error: GPUMeshError | None = None
    try:
        async with send(planned.chat, planned.node) as answer:
            async for chunk in answer:
                if chunk.text or chunk.thinking:
                    arrivals_s.append(run.now())
                if chunk.done:
                    counters, done_reason = chunk.counters, chunk.done_reason
            node, attempts = answer.node, answer.attempts
    except GPUMeshError as raised:
        error = raised
        node = raised.node or node
    tokens = counters.tokens if counters is not None else None
    outcome = SampleOutcome.SERVED
    if error is not None:
        outcome = SampleOutcome.CUT if arrivals_s or isinstance(error, StreamCut) else SampleOutcome.FAILED
    run.add(
        LoadSample(
            stage=run.stage.name,
            index=index,
            outcome=outcome,
            intended_s=intended_s,
            sent_s=sent_s,
            ended_s=run.now(),
            node=node,
            attempts=attempts,
            route=route,
            arrivals_s=tuple(arrivals_s),
            tokens=len(arrivals_s) if tokens is None else tokens,
            counted_pieces=tokens is None,
            prompt_tokens=counters.prompt_tokens if counters is not None else None,
            counters=counters,
            done_reason=done_reason,
            error_code=error.code if error is not None else None,
            error=error.message if error is not None else None,
        )
    )


async def _measure_lag(lags: list[float], clock: Callable[[], float]) -> None:
    """Measures how late (ms) the event loop returns from a short sleep: so wrong can each measured latency be."""
    while True:
        start = clock()
        await asyncio.sleep(LAG_SAMPLE_S)
        lags.append(max((clock() - start - LAG_SAMPLE_S) * 1000.0, 0.0))


async def _disturb(run: _Run, disturbance: Disturbance, disturbances: list[str], disturbed_s: list[float]) -> None:
    """Disturbs the run after a third of the answers. Ends the disturbance after two thirds, or when the run ends.

    Adds a description to ``disturbances``, and the times of start and end to ``disturbed_s``."""
    total = len(run.stage.requests)
    await _wait_for_records(run, total // 3)
    disturbances.append(await disturbance.begin())
    disturbed_s.append(run.now())
    try:
        await _wait_for_records(run, 2 * total // 3)
    finally:
        # Also when the run has ended or was cancelled: the node must not stay out of service.
        await disturbance.end()
        disturbed_s.append(run.now())


async def _wait_for_records(run: _Run, count: int) -> None:
    while len(run.records) < count:
        run.progress.clear()
        await run.progress.wait()
