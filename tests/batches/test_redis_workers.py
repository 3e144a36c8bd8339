"""Two workers on one batch in a real Redis, which is killed, or which one of them cannot reach for some time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpumesh.batches.base import BatchStore
from gpumesh.batches.engine import BatchWorker, WorkTimes
from gpumesh.batches.redis.store import RedisBatchStore
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchCounts, BatchRequest, BatchStatus, NewBatch, Reply
from gpumesh.errors import BatchStoreError
from tests.batches.scripted_sender import ScriptedSender
from tests.batches.stores import one_chunk
from tests.prerequisites import needs
from tests.redis_server import APPENDONLY, RedisServer, redis_server
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]

MESH = "workers"
TIMES = WorkTimes(lease_s=0.5, renew_s=0.05, idle_s=0.01, settle_s=0.05, pause_s=0.01, longest_pause_s=0.05)


@dataclass
class Worker:
    """A worker with a store of its own. ``problems``: what it has reported."""

    sender: ScriptedSender
    worker: BatchWorker
    problems: list[BatchStoreError | None] = field(default_factory=list)

    def is_cut_off(self) -> bool:
        return bool(self.problems) and self.problems[-1] is not None

    def is_back(self) -> bool:
        return bool(self.problems) and self.problems[-1] is None


def answer(request: BatchRequest) -> Reply:
    return Reply(200, json.dumps({"response": f"to {request.line}"}).encode(), "n1")


@asynccontextmanager
async def working(url: str, *, slots: int = 8) -> AsyncIterator[Worker]:
    async with RedisBatchStore(url, MESH, password=lambda: None) as store:
        sender = ScriptedSender(answer)
        problems: list[BatchStoreError | None] = []
        engine = BatchWorker(store, sender, count_slots=lambda: slots, times=TIMES, on_problem=problems.append)
        task = asyncio.create_task(engine.run())
        try:
            yield Worker(sender, engine, problems)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def submit(store: BatchStore, count: int) -> Batch:
    file = await store.create_file(
        "in.jsonl", one_chunk(b"".join(b'"prompt %d"\n' % number for number in range(count)))
    )
    return await store.create_batch(NewBatch(PROMPT_ENDPOINT, file.id))


async def wait_for(store: BatchStore, batch: Batch, condition: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(40.0):
        while True:
            with contextlib.suppress(BatchStoreError):
                if condition(found := await store.get_batch(batch.id)):
                    return found
            await asyncio.sleep(0.005)


async def wait_for_completed(store: BatchStore, batch: Batch, count: int) -> None:
    await wait_for(store, batch, lambda found: found.counts.completed >= count)


async def check_results(store: BatchStore, batch: Batch, count: int) -> None:
    """Each line has exactly one result, and it is its own."""
    lines: Counter[int] = Counter()
    after = ""
    while results := await store.read_results(batch.id, after=after):
        after = results[-1].position
        lines.update(result.line for result in results)
        assert all(json.loads(result.content)["response"] == f"to {result.line}" for result in results)
    assert lines == Counter(range(1, count + 1))


async def test_a_batch_goes_on_when_its_redis_was_killed(tmp_path: Path) -> None:
    count = 400
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(redis_server(tmp_path, *APPENDONLY))
        store = await stack.enter_async_context(RedisBatchStore(server.url, MESH, password=lambda: None))
        workers = [await stack.enter_async_context(working(server.url)) for _ in range(2)]
        batch = await submit(store, count)
        for completed in (100, 250):
            await wait_for_completed(store, batch, completed)
            server.stop()
            for worker in workers:
                await wait_until(worker.is_cut_off, "it has noticed that Redis is away")
            await server.start()
            for worker in workers:
                await wait_until(worker.is_back, "it has noticed that Redis is back")
        ended = await wait_for(store, batch, lambda found: found.status.has_ended)
        assert (ended.status, ended.counts.completed, ended.counts.failed) == (BatchStatus.COMPLETED, count, 0)
        await check_results(store, batch, count)


@asynccontextmanager
async def reachable(server: RedisServer, folder: Path) -> AsyncIterator[tuple[str, Callable[[bool], None]]]:
    """The URL of a way to the server, and a function that opens or cuts this way."""
    is_open = True
    tasks: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers.add(writer)
        if is_open:
            from_server, to_server = await asyncio.open_unix_connection(server.socket)
            writers.add(to_server)
            await asyncio.gather(pump(reader, to_server), pump(from_server, writer))
        writer.close()

    def set_open(value: bool) -> None:
        nonlocal is_open
        is_open = value
        if not value:
            for writer in writers:
                writer.transport.abort()

    listening = await asyncio.start_unix_server(relay, folder / "way.sock")
    try:
        yield f"unix://{folder / 'way.sock'}", set_open
    finally:
        listening.close()
        set_open(False)
        await asyncio.gather(*tasks)


async def test_a_worker_that_cannot_reach_redis_for_some_time_records_nothing_twice(tmp_path: Path) -> None:
    count = 60
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(redis_server(tmp_path))
        store = await stack.enter_async_context(RedisBatchStore(server.url, MESH, password=lambda: None))
        url, set_open = await stack.enter_async_context(reachable(server, tmp_path))
        lonely = await stack.enter_async_context(working(url))
        lonely.sender.gate.clear()
        batch = await submit(store, count)
        await wait_until(lambda: len(lonely.sender.sent) >= 8, "it has as many as it has slots")
        found = await store.get_batch(batch.id)
        set_open(False)
        await wait_until(lonely.is_cut_off, "it is cut off")
        async with working(server.url) as other:
            ended = await wait_for(store, batch, lambda found: found.status.has_ended)
            assert len(other.sender.sent) == count, "also those that the lonely one has"
        assert found.counts.claimed == len(lonely.sender.sent)
        lonely.sender.gate.set()
        set_open(True)
        await wait_until(lonely.is_back, "it is back")
        await submit(store, 1)
        await wait_until(lambda: len(lonely.sender.sent) > found.counts.claimed, "it works on the next batch")
        again = await store.get_batch(batch.id)
        assert again == ended
        assert (again.status, again.counts.completed) == (BatchStatus.COMPLETED, count)
        assert again.counts == BatchCounts(count, count, 0, 0, again.counts.output_bytes, 0)
        await check_results(store, batch, count)
