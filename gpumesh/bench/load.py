"""Sends a stage's requests and writes down what came of each: a closed loop keeps so many in flight, an open loop
sends at the intended moments whether or not the answers come.

The load goes through ``SendPrompt``: a mesh in this process, a running one, or one server (``routes``). Cancelling a
stage ends its requests, and so the generation on the hosts.
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
# Past these the figures say more about this machine than about the mesh.
BUSY_CLIENT_CPU = 0.85
LATE_CLIENT_MS = 5.0


class AnswerStream(Protocol):
    """One answer as it comes; ``node`` and ``attempts`` are known once its first piece is there."""

    @property
    def node(self) -> str | None: ...

    @property
    def attempts(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class SendPrompt(Protocol):
    """Sends one prompt to a given node, or lets the mesh choose. Raises GPUMeshError; leaving it early cancels it."""

    def __call__(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]: ...


class Disturbance(Protocol):
    """Takes a node away in mid-run and gives it back; ``begin`` says what it did."""

    async def begin(self) -> str: ...

    async def end(self) -> None: ...


class RequestOutcome(StrEnum):
    SERVED = "served"
    FAILED = "failed"
    CUT = "cut"
    """The answer began, and did not come to its end."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What came of one request. Moments are seconds from the stage's start; ``arrivals_s`` has one for each piece.

    ``tokens`` are the server's own count, or the number of pieces where it gave none (``counted_pieces``).
    """

    stage: str
    index: int
    outcome: RequestOutcome
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
        """From the intended moment of sending."""
        return (self.arrivals_s[0] - self.intended_s) * 1000.0 if self.arrivals_s else None

    @property
    def end_to_end_ms(self) -> float | None:
        return (self.ended_s - self.intended_s) * 1000.0 if self.outcome is RequestOutcome.SERVED else None

    @property
    def last_token_ms(self) -> float | None:
        return (self.arrivals_s[-1] - self.intended_s) * 1000.0 if self.arrivals_s else None


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """How busy this process was while it measured: CPU ÷ wall time (1 is one core), and how late its event loop ran.

    ``bound`` says in words why the figures are the client's own limit; ``None`` when they are not.
    """

    cpu: float
    lag_p99_ms: float
    late_sends: int = 0
    bound: str | None = None


@dataclass(frozen=True, slots=True)
class StageRun:
    """A stage as it was run. ``disturbed_s`` is when the disturbance began and ended, with what it did."""

    stage: Stage
    records: tuple[RequestRecord, ...]
    duration_s: float
    client: ClientLoad
    disturbed_s: tuple[float, float] | None = None
    disturbance: str | None = None


def judge_client(cpu: float, lags_ms: Sequence[float], late_sends: int, sends: int) -> ClientLoad:
    """Pure. ``late_sends`` of an open loop are those that went out more than LATE_CLIENT_MS past their moment."""
    ordered = sorted(lags_ms)
    often = percentile(ordered, 0.9) if ordered else 0.0
    bound = None
    if cpu >= BUSY_CLIENT_CPU:
        bound = f"this process used {cpu:.0%} of a core: the load generator may be what limits"
    elif often >= LATE_CLIENT_MS:
        bound = f"this process often ran {often:.0f} ms late: something else uses this machine's cores"
    elif sends and late_sends / sends > 0.01:
        bound = f"{late_sends} of {sends} requests went out late: the load generator could not keep up"
    return ClientLoad(cpu, percentile(ordered, 0.99) if ordered else 0.0, late_sends, bound)


@dataclass(slots=True)
class _Run:
    """The moving parts of one stage."""

    stage: Stage
    clock: Callable[[], float]
    on_record: Callable[[RequestRecord], None]
    start: float = 0.0
    records: list[RequestRecord] = field(default_factory=list)
    late_sends: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return self.clock() - self.start

    def add(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.progress.set()
        self.on_record(record)


async def run_stage(
    send: SendPrompt,
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_record: Callable[[RequestRecord], None] = lambda _: None,
    disturbance: Disturbance | None = None,
) -> StageRun:
    """Sends all of a stage's requests and waits for their ends. A request that fails is a record, not an error."""
    run = _Run(stage, clock, on_record)
    lags: list[float] = []
    told: list[str] = []
    disturbed: list[float] = []
    cpu = time.process_time()
    run.start = clock()
    async with asyncio.TaskGroup() as around:
        helpers = [around.create_task(_gauge(lags, clock))]
        if stage.disturb and disturbance is not None:
            helpers.append(around.create_task(_disturb(run, disturbance, told, disturbed)))
        try:
            if stage.concurrency is None:
                await _open_loop(send, run, sleep)
            else:
                await _closed_loop(send, run, stage.concurrency)
            duration = run.now()
            cpu = time.process_time() - cpu
        finally:
            for helper in helpers:
                helper.cancel()
    if disturbed and len(disturbed) == 1:
        disturbed.append(duration)
    records = tuple(sorted(run.records, key=lambda record: record.index))
    return StageRun(
        stage,
        records,
        duration,
        judge_client(cpu / duration if duration > 0 else 0.0, lags, run.late_sends, len(records)),
        (disturbed[0], disturbed[1]) if disturbed else None,
        told[0] if told else None,
    )


async def run_interleaved(
    routes: Sequence[tuple[str, SendPrompt]],
    stage: Stage,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_record: Callable[[RequestRecord], None] = lambda _: None,
) -> StageRun:
    """One request at a time, over one route after the other, so that what drifts meanwhile meets all routes alike.

    Each round of as many requests as there are routes begins with another route: none is always first.
    """
    run = _Run(stage, clock, on_record)
    lags: list[float] = []
    cpu = time.process_time()
    run.start = clock()
    async with asyncio.TaskGroup() as around:
        gauge = around.create_task(_gauge(lags, clock))
        try:
            for index, planned in enumerate(stage.requests):
                turn, place = divmod(index, len(routes))
                name, send = routes[(place + turn) % len(routes)]
                await _one(send, run, index, planned, route=name)
            duration = run.now()
            cpu = time.process_time() - cpu
        finally:
            gauge.cancel()
    client = judge_client(cpu / duration if duration > 0 else 0.0, lags, 0, len(run.records))
    return StageRun(stage, tuple(run.records), duration, client)


async def _closed_loop(send: SendPrompt, run: _Run, concurrency: int) -> None:
    waiting: Iterator[tuple[int, PlannedRequest]] = iter(enumerate(run.stage.requests))

    async def worker() -> None:
        for index, planned in waiting:
            await _one(send, run, index, planned)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(run.stage.requests))):
            group.create_task(worker())


async def _open_loop(send: SendPrompt, run: _Run, sleep: Callable[[float], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for index, planned in sorted(enumerate(run.stage.requests), key=lambda pair: pair[1].at_s or 0.0):
            wait = (planned.at_s or 0.0) - run.now()
            if wait > 0:
                await sleep(wait)
            group.create_task(_one(send, run, index, planned))


async def _one(send: SendPrompt, run: _Run, index: int, planned: PlannedRequest, *, route: str | None = None) -> None:
    sent = run.now()
    intended = sent if planned.at_s is None else planned.at_s
    if (sent - intended) * 1000.0 > LATE_CLIENT_MS:
        run.late_sends += 1
    arrivals: list[float] = []
    counters: ServerCounters | None = None
    done_reason: str | None = None
    node, attempts = planned.node, 0
    error: GPUMeshError | None = None
    try:
        async with send(planned.chat, planned.node) as answer:
            async for chunk in answer:
                if chunk.text or chunk.thinking:
                    arrivals.append(run.now())
                if chunk.done:
                    counters, done_reason = chunk.counters, chunk.done_reason
            node, attempts = answer.node, answer.attempts
    except GPUMeshError as raised:
        error = raised
        node = raised.node or node
    tokens = counters.tokens if counters is not None else None
    outcome = RequestOutcome.SERVED
    if error is not None:
        outcome = RequestOutcome.CUT if arrivals or isinstance(error, StreamCut) else RequestOutcome.FAILED
    run.add(
        RequestRecord(
            stage=run.stage.name,
            index=index,
            outcome=outcome,
            intended_s=intended,
            sent_s=sent,
            ended_s=run.now(),
            node=node,
            attempts=attempts,
            route=route,
            arrivals_s=tuple(arrivals),
            tokens=len(arrivals) if tokens is None else tokens,
            counted_pieces=tokens is None,
            prompt_tokens=counters.prompt_tokens if counters is not None else None,
            counters=counters,
            done_reason=done_reason,
            error_code=error.code if error is not None else None,
            error=error.message if error is not None else None,
        )
    )


async def _gauge(lags: list[float], clock: Callable[[], float]) -> None:
    """How late the event loop comes back from a short sleep: what every measured latency may be wrong by."""
    while True:
        before = clock()
        await asyncio.sleep(LAG_SAMPLE_S)
        lags.append(max((clock() - before - LAG_SAMPLE_S) * 1000.0, 0.0))


async def _disturb(run: _Run, disturbance: Disturbance, told: list[str], moments: list[float]) -> None:
    """Takes the node away after a third of the answers and gives it back after two thirds, or when the run ends."""
    total = len(run.stage.requests)
    await _reached(run, total // 3)
    told.append(await disturbance.begin())
    moments.append(run.now())
    try:
        await _reached(run, 2 * total // 3)
    finally:
        # Also when the run ended or was cancelled meanwhile: the node must not stay away.
        await disturbance.end()
        moments.append(run.now())


async def _reached(run: _Run, count: int) -> None:
    while len(run.records) < count:
        run.progress.clear()
        await run.progress.wait()
