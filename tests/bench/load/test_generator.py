"""The load generator on a server in this process that does what it is told; time is the test's own where it counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from gpumesh.backends.base import ChatRequest, Chunk, ServerCounters
from gpumesh.bench.load.generator import run_over_routes, run_stage
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from gpumesh.errors import BackendUnreachable, StreamCut
from tests.bench.example_results import CHAT, stage

PIECES = 3
Script = Callable[[int], Awaitable[None]]


@dataclass
class Answer:
    """As the mesh's: ``node`` and ``attempts`` are known with the first piece."""

    chunks: AsyncIterator[Chunk]
    node: str | None = None
    attempts: int = 1

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self.chunks


@dataclass
class Server:
    """A ``Send``. ``before`` runs before each answer, by its number; ``fail`` and ``cut`` are the numbers of those."""

    before: Script | None = None
    fail: frozenset[int] = frozenset()
    cut: frozenset[int] = frozenset()
    counted: bool = True
    asked: list[tuple[ChatRequest, str | None]] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0

    @asynccontextmanager
    async def __call__(self, request: ChatRequest, node: str | None) -> AsyncGenerator[Answer]:
        number = len(self.asked)
        self.asked.append((request, node))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self.before is not None:
                await self.before(number)
            if number in self.fail:
                raise BackendUnreachable("nobody is there", node="beta")
            yield Answer(self._pieces(number), node or "alpha", 2)
        finally:
            self.in_flight -= 1

    async def _pieces(self, number: int) -> AsyncGenerator[Chunk]:
        for piece in range(PIECES):
            await asyncio.sleep(0)
            yield Chunk(text=f"word{piece}")
            if number in self.cut:
                raise StreamCut("the answer stopped short", node="alpha")
        counters = ServerCounters(prompt_tokens=5, tokens=9, total_ms=3.0, eval_ms=2.0) if self.counted else None
        yield Chunk(done=True, done_reason="length", counters=counters)


async def turns() -> None:
    """Lets everything that can go on go on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_from_its_sending_to_its_end() -> None:
    seen: list[LoadSample] = []
    server = Server()
    done = await run_stage(server, stage(count=1), on_record=seen.append)
    assert isinstance(done, StageRun)
    (only,) = done.records
    assert seen == [only]
    assert (only.stage, only.index, only.outcome, only.node, only.attempts) == (
        "mesh",
        0,
        SampleOutcome.SERVED,
        "alpha",
        2,
    )
    assert 0 <= only.intended_s == only.sent_s < only.arrivals_s[0] < only.arrivals_s[-1] <= only.ended_s
    assert len(only.arrivals_s) == PIECES, "the frame without text is no arrival"
    assert (only.tokens, only.prompt_tokens, only.done_reason) == (9, 5, "length")
    assert only.ttft_ms == pytest.approx((only.arrivals_s[0] - only.sent_s) * 1000)
    assert done.duration_s >= only.ended_s


async def test_without_the_servers_count_there_is_none() -> None:
    """The number of pieces is not the number of tokens."""
    (only,) = (await run_stage(Server(counted=False), stage(count=1))).records
    assert (only.tokens, only.counters, only.prompt_tokens, len(only.arrivals_s)) == (None, None, None, PIECES)


async def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    gate = asyncio.Semaphore(0)

    async def wait(_: int) -> None:
        await gate.acquire()

    server = Server(before=wait)
    running = asyncio.create_task(run_stage(server, stage(count=7, concurrency=3)))
    for finished in range(7):
        await turns()
        assert server.in_flight == min(3, 7 - finished)
        gate.release()
    done = await running
    assert server.most == 3
    assert sorted(one.index for one in done.records) == list(range(7))
    assert [one.index for one in done.records] == list(range(7)), "in order of the plan, whichever ended first"


async def test_more_places_than_requests() -> None:
    assert len((await run_stage(Server(), stage(count=2, concurrency=64))).records) == 2


async def test_what_fails_is_a_record_and_the_others_go_on() -> None:
    done = await run_stage(Server(fail=frozenset({1}), cut=frozenset({2})), stage(count=4))
    assert [one.outcome for one in done.records] == [
        SampleOutcome.SERVED,
        SampleOutcome.FAILED,
        SampleOutcome.CUT,
        SampleOutcome.SERVED,
    ]
    failed, cut = done.records[1:3]
    assert (failed.error_code, failed.error, failed.node, failed.tokens) == (
        BackendUnreachable.code,
        "nobody is there",
        "beta",
        None,
    )
    assert (failed.ttft_ms, failed.end_to_end_ms) == (None, None)
    assert (cut.error, len(cut.arrivals_s), cut.end_to_end_ms) == ("the answer stopped short", 1, None)


async def test_a_fault_of_our_own_ends_the_run() -> None:
    async def stumble(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await run_stage(Server(before=stumble), stage(count=2))
    assert caught.group_contains(ZeroDivisionError)


@dataclass
class Time:
    """``sleep`` passes it, ``late_s`` more than it was asked to."""

    now: float = 1000.0
    late_s: float = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await turns()  # what is ready runs first
        self.now += seconds + self.late_s


def open_stage(*moments: float) -> Stage:
    return Stage("replay", StageKind.TRACE, tuple(PlannedRequest(CHAT, at_s=at) for at in moments), concurrency=None)


async def test_an_open_loop_sends_at_the_moments_that_were_meant() -> None:
    time = Time()
    done = await run_stage(Server(), open_stage(0.0, 0.5, 0.5, 2.0), clock=time, sleep=time.sleep)
    assert [one.intended_s for one in done.records] == [0.0, 0.5, 0.5, 2.0]
    assert [one.sent_s for one in done.records] == [0.0, 0.5, 0.5, 2.0]
    assert done.client.late_sends == 0


async def test_an_open_loop_sends_nothing_early() -> None:
    time = Time()

    async def sleep_to_the_millisecond(seconds: float) -> None:
        await time.sleep(seconds if seconds < 0.001 else seconds - 0.0004)  # uvloop rounds the times of its timers

    done = await run_stage(Server(), open_stage(0.1), clock=time, sleep=sleep_to_the_millisecond)
    assert done.records[0].sent_s >= 0.1


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    time = Time()
    everybody = asyncio.Event()

    async def wait(number: int) -> None:
        if number == 2:
            everybody.set()
        await everybody.wait()

    server = Server(before=wait)
    async with asyncio.timeout(20):
        await run_stage(server, open_stage(0.0, 1.0, 2.0), clock=time, sleep=time.sleep)
    assert server.most == 3


async def test_latency_counts_from_the_intended_moment() -> None:
    """A client that falls behind must not hide the waits that it causes."""
    time = Time(late_s=0.25)
    done = await run_stage(Server(), open_stage(1.0), clock=time, sleep=time.sleep)
    (only,) = done.records
    assert (only.intended_s, only.sent_s) == (1.0, 1.25)
    assert only.ttft_ms == pytest.approx(250.0)
    assert only.end_to_end_ms == pytest.approx(250.0)
    assert done.client.late_sends == 1
    assert done.client.bound is not None, "the reason may also be this machine, if other programs use it"


async def test_nothing_more_is_sent_when_the_time_is_up() -> None:
    open_time = Time()
    plan = replace(open_stage(0.0, 1.0, 2.0, 3.0), duration_s=2.0)
    done = await run_stage(Server(), plan, clock=open_time, sleep=open_time.sleep)
    assert [record.intended_s for record in done.records] == [0.0, 1.0]
    closed_time = Time()

    async def take_a_second(_: int) -> None:
        await closed_time.sleep(1.0)

    closed = replace(stage(count=9), duration_s=3.0)
    done = await run_stage(Server(before=take_a_second), closed, clock=closed_time, sleep=closed_time.sleep)
    assert [record.sent_s for record in done.records] == [0.0, 1.0, 2.0]
    assert len(done.records) == 3, "what was not sent is no record"


def conversations(*ids: int) -> Stage:
    requests = tuple(PlannedRequest(CHAT, conversation=number) for number in ids)
    return replace(stage(count=0), requests=requests)


async def test_a_turn_follows_the_answer_before_it_and_repeats_what_was_said() -> None:
    server, time = Server(), Time()
    plan = replace(conversations(1, 2, 1, 1), think_s=2.0, concurrency=2)
    done = await run_stage(server, plan, clock=time, sleep=time.sleep)
    said = [[(message.role, message.content) for message in chat.messages] for chat, _ in server.asked]
    question, answer = ("user", CHAT.messages[0].content), ("assistant", "word0word1word2")
    assert sorted(map(len, said)) == [1, 1, 3, 5]
    longest = max(said, key=len)
    assert longest == [question, answer, question, answer, question]
    assert server.most == 2, "two conversations at once, one turn of each"
    by_index = {record.index: record for record in done.records}
    assert by_index[2].sent_s >= by_index[0].ended_s + 2.0
    assert by_index[3].sent_s >= by_index[2].ended_s + 2.0


async def test_a_turn_that_failed_is_not_repeated_in_the_next_one() -> None:
    server = Server(fail=frozenset([0]))
    done = await run_stage(server, replace(conversations(1, 1), concurrency=1))
    assert [record.outcome for record in done.records] == [SampleOutcome.FAILED, SampleOutcome.SERVED]
    assert [len(chat.messages) for chat, _ in server.asked] == [1, 1]


async def test_an_open_loop_begins_conversations_by_the_clock() -> None:
    server, time = Server(), Time()
    plan = conversations(1, 1, 2, 2)
    first = [replace(request, at_s=at_s) for request, at_s in zip(plan.requests, (0.0, None, 1.0, None), strict=True)]
    done = await run_stage(
        server, replace(plan, requests=tuple(first), concurrency=None, think_s=0.5), clock=time, sleep=time.sleep
    )
    assert [len(chat.messages) for chat, _ in server.asked].count(3) == 2
    assert [record.intended_s for record in done.records][::2] == [0.0, 1.0]
    assert all(record.intended_s == record.sent_s for record in done.records[1::2]), "a turn is due when it is sent"


async def test_an_unordered_plan_goes_by_the_clock() -> None:
    time = Time()
    server = Server()
    plan = open_stage(1.0, 0.0)
    first = replace(plan.requests[0], node="later")
    done = await run_stage(server, replace(plan, requests=(first, plan.requests[1])), clock=time, sleep=time.sleep)
    assert [node for _, node in server.asked] == [None, "later"]
    assert [one.index for one in done.records] == [0, 1]


async def test_each_request_takes_its_own_route_alone() -> None:
    asked: list[str] = []

    def route(name: str) -> Server:
        async def note(_: int) -> None:
            asked.append(name)

        return Server(before=note)

    routes = {name: route(name) for name in "abc"}
    order = ["b", "a", "c", "c", "a", "b"]
    of = replace(stage(), requests=tuple(PlannedRequest(CHAT, route=name) for name in order))
    done = await run_over_routes(routes, of)
    assert asked == order
    assert [one.route for one in done.records] == order
    assert max(server.most for server in routes.values()) == 1, "one request at a time"


@dataclass
class Away:
    """A disturbance that says when it was begun and ended."""

    progress: Callable[[], int]
    begun: int | None = None
    ended: int | None = None

    async def begin(self) -> str:
        self.begun = self.progress()
        return "alpha taken away"

    async def end(self) -> None:
        self.ended = self.progress()


async def test_a_node_is_away_for_the_middle_third() -> None:
    seen: list[LoadSample] = []
    away = Away(lambda: len(seen))
    done = await run_stage(Server(), stage(count=9, disturb=True), on_record=seen.append, disturbance=away)
    assert away.begun is not None
    assert away.ended is not None
    assert 3 <= away.begun < away.ended <= 9
    assert done.disturbance == "alpha taken away"
    assert done.disturbed_s is not None
    begin, end = done.disturbed_s
    assert 0 < begin <= end <= done.duration_s


async def test_what_is_cancelled_ends_its_requests_and_gives_the_node_back() -> None:
    forever = asyncio.Event()

    async def hang_after_some(number: int) -> None:
        if number >= 4:
            await forever.wait()

    server = Server(before=hang_after_some)
    away = Away(lambda: 0)
    running = asyncio.create_task(run_stage(server, stage(count=9, disturb=True), disturbance=away))
    while away.begun is None:
        await asyncio.sleep(0)
    await turns()
    assert server.in_flight == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.in_flight == 0
    assert away.ended is not None, "the node must not stay away"
