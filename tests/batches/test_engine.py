"""``BatchWorker`` on a real SQLite store, with a sender whose answers the tests decide."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from gpumesh.batches.engine import BatchWorker, WorkTimes
from gpumesh.batches.retries import AWAY_DELAY_S, MAX_TRIES
from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchRequest, BatchStatus, NewBatch, Reply
from gpumesh.errors import BackendError, BatchOwnerUnknown, BatchStoreError, NoNodeError, QueueFull
from tests.batches.scripted_sender import OK, ScriptedSender
from tests.batches.test_sqlite_store import set_page_limit

CHAT = "/v1/chat/completions"
# Nothing waits for wall time: delays of requests are by the store's clock, which runs a minute ahead at each look.
TIMES = WorkTimes(lease_s=1e9, renew_s=0.01, idle_s=0.002, settle_s=0.01, pause_s=0.002)


class FastClock:
    """Each look is a minute later than the one before, while it ``runs``."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.runs = False

    def __call__(self) -> float:
        self.now += 60.0 if self.runs else 0.0
        return self.now


@asynccontextmanager
async def open_store(tmp_path: Path, clock: Callable[[], float] | None = None) -> AsyncIterator[SqliteBatchStore]:
    path = tmp_path / "batches.sqlite"
    async with SqliteBatchStore(path) if clock is None else SqliteBatchStore(path, clock=clock) as store:
        yield store


@asynccontextmanager
async def working(worker: BatchWorker) -> AsyncIterator[BatchWorker]:
    """The worker works during the block. An error that ends it ends the block."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker.run())
        yield worker
        task.cancel()


def make_worker(store: SqliteBatchStore, sender: ScriptedSender, *, slots: int = 4) -> BatchWorker:
    return BatchWorker(store, sender, count_slots=lambda: slots, times=TIMES, clock=store._clock)


async def submit(store: SqliteBatchStore, text: str, endpoint: str = PROMPT_ENDPOINT, **values: float) -> Batch:
    async def chunks() -> AsyncIterator[bytes]:
        yield text.encode()

    file = await store.create_file("in.jsonl", chunks())
    return await store.create_batch(NewBatch(endpoint, file.id, **values))  # type: ignore[arg-type]


def prompts(count: int) -> str:
    return "".join(f'"prompt {number}"\n' for number in range(count))


def chat_line(custom_id: str, content: str = "hi", model: str = "m") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}) + "\n"


async def wait_for(store: SqliteBatchStore, batch: Batch, condition: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(20.0):
        while not condition(batch := await store.get_batch(batch.id)):
            await asyncio.sleep(0.002)
    return batch


async def wait_for_end(store: SqliteBatchStore, batch: Batch) -> Batch:
    return await wait_for(store, batch, lambda batch: batch.status.has_ended)


async def read_lines(store: SqliteBatchStore, batch: Batch) -> list[dict[str, object]]:
    return [json.loads(result.content) for result in await store.read_results_by_line(batch.id, limit=10_000)]


async def test_each_prompt_gets_one_result_as_of_run_f(tmp_path: Path) -> None:
    sender = ScriptedSender()
    async with open_store(tmp_path) as store, working(make_worker(store, sender)):
        batch = await wait_for_end(store, await submit(store, prompts(50)))
        assert (batch.status, batch.counts.completed, batch.counts.claimed) == (BatchStatus.COMPLETED, 50, 0)
        lines = await read_lines(store, batch)
        assert [line["index"] for line in lines] == list(range(50))
        assert lines[3] == {
            "index": 3,
            "prompt": "prompt 3",
            "response": "yes",
            "node": None,
            "attempts": 0,
            "ttft_ms": None,
            "total_ms": None,
            "tokens": None,
            "tokens_per_s": None,
            "error": None,
        }
    assert len(sender.sent) == 50
    assert 4 <= sender.most_at_once <= 6  # the slots and a few more


async def test_results_of_openai_requests_have_their_form(tmp_path: Path) -> None:
    def answer(request: BatchRequest) -> Reply:
        return Reply(400, b"no\njson") if request.custom_id == "bad" else Reply(200, b'{\n "a": "\xc3\xa4"\n}')

    async with open_store(tmp_path) as store, working(make_worker(store, ScriptedSender(answer))):
        batch = await submit(store, chat_line("good") + "\n{\n" + chat_line("bad"), CHAT)
        batch = await wait_for_end(store, batch)
        assert (batch.counts.completed, batch.counts.failed, batch.error_count) == (1, 1, 1)
        assert [(error.line, error.code) for error in batch.errors] == [(3, "invalid_json_line")]
        good, bad = await read_lines(store, batch)
    assert good["custom_id"] == "good"
    assert good["error"] is None
    response = good["response"]
    assert isinstance(response, dict)
    assert response == {"status_code": 200, "request_id": good["id"], "body": {"a": "ä"}}
    assert bad["response"] == {"status_code": 400, "request_id": bad["id"], "body": "no\njson"}


async def test_prompts_with_the_same_beginning_go_one_after_the_other(tmp_path: Path) -> None:
    beginnings = ["a" * 2000, "b" * 2000, "c" * 2000]
    text = "".join(chat_line(f"{number}", f"{beginnings[number % 3]} {number}") for number in range(30))
    sender = ScriptedSender()
    async with open_store(tmp_path) as store, working(make_worker(store, sender)):
        await wait_for_end(store, await submit(store, text, CHAT))
    sessions = [request.session for request in sender.sent]
    assert len(set(sessions)) == 3
    changes = sum(before != after for before, after in pairwise(sessions))
    assert changes == 2


async def test_a_failure_of_the_request_counts_and_is_its_result_at_last(tmp_path: Path) -> None:
    clock = FastClock()
    sender = ScriptedSender(lambda _: BackendError("it broke", node="n1"))
    async with open_store(tmp_path, clock) as store:
        batch = await submit(store, prompts(1), window_s=1e9)
        clock.runs = True
        async with working(make_worker(store, sender)):
            batch = await wait_for_end(store, batch)
            (line,) = await read_lines(store, batch)
            assert (line["error"], line["node"], line["attempts"]) == ("it broke", "n1", MAX_TRIES)
            assert len(sender.sent) == MAX_TRIES
            sender.answer = lambda _: OK
            batch = await wait_for_end(store, await store.retry(batch.id))
            assert (batch.counts.completed, batch.counts.failed, batch.counts.error_bytes) == (1, 0, 0)
            (line,) = await read_lines(store, batch)
            assert line["error"] is None


async def test_while_no_node_is_there_a_batch_waits_and_others_do_not(tmp_path: Path) -> None:
    clock = FastClock()
    away = "away"
    sender = ScriptedSender(lambda request: NoNodeError("no node") if away in request.custom_id else OK)
    async with open_store(tmp_path, clock) as store:
        text = "".join(chat_line(f"away {number}") for number in range(100))
        waiting = await submit(store, text, CHAT, window_s=1e9)
        async with working(make_worker(store, sender)):
            other = await wait_for_end(store, await submit(store, prompts(100)))
            assert other.counts.completed == 100
            tried = len(sender.sent) - 100
            assert 1 <= tried <= 6  # as many as may be under way; then the batch waits
            clock.now += AWAY_DELAY_S + 1
            async with asyncio.timeout(20.0):
                while len(sender.sent) - 100 == tried:
                    await asyncio.sleep(0.002)
            assert (await store.get_batch(waiting.id)).counts.unfinished == 100
            away = "nowhere"
            clock.now += AWAY_DELAY_S + 1
            waiting = await wait_for_end(store, waiting)
            assert waiting.counts.completed == 100


async def test_cancel_ends_what_is_under_way_and_retry_goes_on(tmp_path: Path) -> None:
    sender = ScriptedSender()
    async with open_store(tmp_path) as store, working(make_worker(store, sender)):
        sender.gate.clear()
        batch = await submit(store, prompts(20))
        await wait_for(store, batch, lambda batch: batch.counts.claimed >= 4 and len(sender.sent) >= 4)
        assert (await store.cancel(batch.id)).status is BatchStatus.CANCELLING
        batch = await wait_for_end(store, batch)
        assert (batch.status, batch.counts.completed) == (BatchStatus.CANCELLED, 0)
        assert sender.cancelled >= 4
        sender.gate.set()
        batch = await wait_for_end(store, await store.retry(batch.id))
        assert (batch.status, batch.counts.completed) == (BatchStatus.COMPLETED, 20)


@pytest.mark.parametrize("answer", [QueueFull("full", retry_after_s=1.0), Reply(500, b"{}")])
async def test_a_clock_that_is_set_back_holds_nothing_up(tmp_path: Path, answer: Exception | Reply) -> None:
    """The first try fails, and the request or its whole batch waits for some seconds."""
    clock = FastClock()
    sender = ScriptedSender(lambda _: answer if len(sender.sent) == 1 else OK)
    async with open_store(tmp_path, clock) as store, working(make_worker(store, sender)):
        batch = await submit(store, chat_line("a"), CHAT)
        await wait_for(store, batch, lambda batch: bool(sender.sent) and not batch.counts.claimed)
        clock.now -= 86_400.0
        assert (await wait_for_end(store, batch)).counts.completed == 1


async def test_after_the_window_the_rest_fails_as_expired(tmp_path: Path) -> None:
    clock = FastClock()
    sender = ScriptedSender(lambda _: QueueFull("full", retry_after_s=1.0))
    async with open_store(tmp_path, clock) as store:
        batch = await submit(store, chat_line("a") + chat_line("b"), CHAT, window_s=3600.0)
        clock.runs = True
        async with working(make_worker(store, sender)):
            batch = await wait_for_end(store, batch)
        assert (batch.status, batch.counts.failed) == (BatchStatus.EXPIRED, 2)
        for line in await read_lines(store, batch):
            error = line["error"]
            assert isinstance(error, dict)
            assert error["code"] == "batch_expired"


async def test_a_worker_that_stops_gives_its_requests_back(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        sender = ScriptedSender()
        sender.gate.clear()
        async with working(make_worker(store, sender)):
            batch = await submit(store, prompts(20))
            await wait_for(store, batch, lambda batch: batch.counts.claimed >= 4)
        assert (await store.get_batch(batch.id)).counts.claimed == 0
        sender.gate.set()
        async with working(make_worker(store, sender)):
            assert (await wait_for_end(store, batch)).counts.completed == 20


@pytest.mark.parametrize("iterations", range(5))
async def test_a_worker_stops_although_news_come_at_the_same_moment(tmp_path: Path, iterations: int) -> None:
    """``asyncio.wait_for`` of Python 3.11 loses a cancellation that comes together with the result."""
    async with open_store(tmp_path) as store:
        times = WorkTimes(idle_s=60.0, settle_s=60.0)
        worker = BatchWorker(store, ScriptedSender(), count_slots=lambda: 4, times=times)
        task = asyncio.create_task(worker.run())
        await asyncio.sleep(0.01)
        worker._has_news.set()
        store._has_changed.set()
        for _ in range(iterations):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5.0)
        assert task.done()


async def wait_for_settles(store: SqliteBatchStore, count: int) -> None:
    """Returns when ``settle`` has worked so often."""
    settle, has_settled = store.settle, asyncio.Semaphore(0)

    async def settle_and_count() -> None:
        await settle()
        has_settled.release()

    store.settle = settle_and_count  # type: ignore[method-assign]
    for _ in range(count):
        await has_settled.acquire()


async def test_a_store_that_is_full_is_waited_for(tmp_path: Path) -> None:
    problems: list[BatchStoreError | None] = []
    sender = ScriptedSender(lambda _: Reply(200, b'{"response": "' + b"x" * 50_000 + b'"}'))
    async with open_store(tmp_path) as store:
        worker = make_worker(store, sender)
        worker._patience._on_problem = problems.append
        sender.gate.clear()
        async with working(worker):
            batch = await submit(store, prompts(20))
            await wait_for(store, batch, lambda batch: batch.counts.claimed >= 4)
            await set_page_limit(store, 1)
            sender.gate.set()
            async with asyncio.timeout(20.0):
                while not problems:
                    await asyncio.sleep(0.002)
                await wait_for_settles(store, 3)  # these work: they have nothing to write
            assert (await store.get_batch(batch.id)).counts.completed == 0
            await set_page_limit(store, 1_000_000)
            assert (await wait_for_end(store, batch)).counts.completed == 20
        assert len(sender.sent) == 20
        assert [type(problem) for problem in problems] == [BatchStoreError, type(None)]


async def test_a_bug_in_a_sender_fails_one_request_only(tmp_path: Path) -> None:
    clock = FastClock()
    sender = ScriptedSender(lambda request: ValueError("bug") if request.line == 2 else OK)
    async with open_store(tmp_path, clock) as store:
        batch = await submit(store, prompts(3), window_s=1e9)
        clock.runs = True
        async with working(make_worker(store, sender)):
            batch = await wait_for_end(store, batch)
        assert (batch.counts.completed, batch.counts.failed) == (2, 1)


async def test_a_file_without_a_good_line_fails(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store, working(make_worker(store, ScriptedSender())):
        for blank in ("", "\n \n"):
            batch = await wait_for_end(store, await submit(store, blank, CHAT))
            assert batch.status is BatchStatus.FAILED
            assert [(error.line, error.code) for error in batch.errors] == [(0, "empty_file")]
        batch = await wait_for_end(store, await submit(store, "\n{}\n", CHAT))
        assert (batch.status, batch.error_count) == (BatchStatus.FAILED, 1)


async def test_reading_goes_on_where_a_killed_process_has_stopped(tmp_path: Path) -> None:
    """The second process adds no line twice, and still knows the names that the first has read."""
    async with open_store(tmp_path) as store:
        text = "".join(chat_line(f"id {number}") for number in range(250)) + chat_line("id 7")
        batch = await submit(store, text, CHAT)

        class Killed(Exception):
            pass

        add_requests, calls = store.add_requests, 0

        async def add_once(*args: object, **values: object) -> bool:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Killed
            return await add_requests(*args, **values)  # type: ignore[arg-type]

        store.add_requests = add_once  # type: ignore[method-assign]
        try:
            await validate_batch(store, batch.id)
        except Killed:
            assert (await store.get_batch(batch.id)).read_lines == 25
        del store.add_requests
        batch = await validate_batch(store, batch.id)
        assert (batch.status, batch.counts.total) == (BatchStatus.IN_PROGRESS, 250)
        assert [(error.line, error.code) for error in batch.errors] == [(251, "duplicate_custom_id")]


async def test_a_batch_of_a_key_that_another_gateway_has_is_left_to_it(tmp_path: Path) -> None:
    def answer(request: BatchRequest) -> Reply | BatchOwnerUnknown:
        return BatchOwnerUnknown("no such key") if request.batch_id == foreign.id else OK

    async with open_store(tmp_path) as store:
        foreign, own = await submit(store, prompts(50)), await submit(store, prompts(3))
        sender = ScriptedSender(answer)
        async with working(make_worker(store, sender)):
            await wait_for(store, own, lambda batch: batch.status is BatchStatus.COMPLETED)
        foreign = await store.get_batch(foreign.id)
        assert (foreign.status, foreign.counts.unfinished) == (BatchStatus.IN_PROGRESS, 50)
        assert len(sender.sent) < 20, "it is not tried again and again"
        claims = await store.claim("other", 50, lease_s=60.0)
        assert {claim.tries for claim in claims} == {0}
