"""Batches on a Redis that is killed, hangs, is full, is another server or loses what it had.

Each test has a redis-server of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpumesh.batches.redis.store import RedisBatchStore
from gpumesh.batches.values import KEPT_S, BatchStatus, NewBatch, Release
from gpumesh.errors import BatchConflict, BatchNotFound, BatchStoreError
from tests.batches.stores import ENDPOINT, LONG_S, answers, lines_of, one_chunk, start_batch
from tests.prerequisites import needs
from tests.redis_server import APPENDONLY, RedisServer, redis_cli, redis_server

pytestmark = [pytest.mark.real, needs("redis-server")]

MESH = "a mesh"
KEYS = f"gpumesh:1:{{{MESH}}}:batches:"


def open_store(server: RedisServer, password: str | None = None, kept_s: float = KEPT_S) -> RedisBatchStore:
    return RedisBatchStore(server.url, MESH, password=lambda: password, kept_s=kept_s)


def calls_of(store: RedisBatchStore) -> list[Callable[[], Awaitable[object]]]:
    """A call of each kind."""
    return [
        lambda: store.create_file("a", one_chunk(b"x")),
        store.list_files,
        lambda: store.get_batch("batch_1"),
        store.list_batches,
        lambda: store.claim("w", 1, lease_s=LONG_S),
        lambda: store.record("w", []),
        lambda: store.read_results("batch_1"),
    ]


async def until_it_answers(store: RedisBatchStore) -> None:
    async with asyncio.timeout(20.0):
        while True:
            try:
                await store.list_files()
                return
            except BatchStoreError:
                await asyncio.sleep(0.01)


async def test_a_killed_redis_has_everything_again_and_the_store_goes_on(tmp_path: Path) -> None:
    async with redis_server(tmp_path, *APPENDONLY) as server, open_store(server) as store:
        batch = await start_batch(store, 6)
        first = await store.claim("w", 3, lease_s=LONG_S)
        await store.record("w", answers(first[:1]))
        await store.release("w", [Release(first[1], counts=True)])
        server.stop()
        for call in calls_of(store):
            with pytest.raises(BatchStoreError, match=r"Redis at .*redis.sock cannot be used for batches"):
                await call()
        await server.start()
        await until_it_answers(store)
        found = await store.get_batch(batch.id)
        assert (found.counts.total, found.counts.completed, found.counts.claimed) == (6, 1, 1)
        claims = await store.claim("v", 9, lease_s=LONG_S)
        assert [(claim.line, claim.tries, claim.lost) for claim in claims] == [
            (2, 1, 0),
            (4, 0, 0),
            (5, 0, 0),
            (6, 0, 0),
        ]
        assert await store.renew("w", first, lease_s=LONG_S) == {first[0].key, first[1].key}
        await store.record("w", answers([first[2], *claims]))
        assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED
        assert [result.line for result in await store.read_results_by_line(batch.id)] == [1, 2, 3, 4, 5, 6]


async def test_a_restarted_redis_without_persistence_has_no_batch_and_the_store_goes_on(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        batch = await start_batch(store, 2)
        claims = await store.claim("w", 2, lease_s=LONG_S)
        server.stop()
        await server.start()
        await until_it_answers(store)
        with pytest.raises(BatchNotFound):
            await store.get_batch(batch.id)
        assert await store.renew("w", claims, lease_s=LONG_S) == {claim.key for claim in claims}
        assert await store.record("w", answers(claims)) == 0
        await start_batch(store, 1)
        assert lines_of(await store.claim("w", 9, lease_s=LONG_S)) == [1]


async def test_a_hung_redis_is_away_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        batch = await start_batch(store, 2)
        server.send(signal.SIGSTOP)
        with monkeypatch.context() as impatient:
            impatient.setattr("gpumesh.batches.redis.script.ANSWER_TIMEOUT_S", 0.2)
            with pytest.raises(BatchStoreError, match="does not answer in time"):
                await store.get_batch(batch.id)
        server.send(signal.SIGCONT)
        assert (await store.get_batch(batch.id)).counts.total == 2


async def test_nobody_notices_a_change_while_redis_is_away(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        server.stop()
        async with asyncio.timeout(20.0):
            await store.wait_for_change(0.05)
        await server.start()
        await until_it_answers(store)
        await start_batch(store, 1)
        async with asyncio.timeout(20.0):
            await store.wait_for_change(30.0)


async def test_a_full_redis_changes_nothing(tmp_path: Path) -> None:
    options = ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    async with redis_server(tmp_path, *options) as server, open_store(server) as store:
        batch = await start_batch(store, 2)
        claims = await store.claim("w", 1, lease_s=LONG_S)

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 200_000

        old = await start_batch(store, 1)
        await store.cancel(old.id)
        with pytest.raises(BatchStoreError, match=r"its memory is full \(maxmemory\)$") as raised:
            await store.create_file("too long", endless())
        assert "`gpumesh batch rm`" in (raised.value.hint or "")
        await redis_cli(server, "CONFIG", "SET", "maxmemory", "1mb")
        before = await store.get_batch(batch.id)
        for call in (
            lambda: store.record("w", answers(claims)),
            lambda: store.claim("w", 1, lease_s=LONG_S),
        ):
            with pytest.raises(BatchStoreError, match="memory"):
                await call()
        assert await store.get_batch(batch.id) == before
        assert await store.renew("w", claims, lease_s=LONG_S) == set(), "what needs no memory works on"
        await store.delete_batch(old.id)  # a person can make room
        await store.delete_file(old.new.input_file_id)
        await redis_cli(server, "CONFIG", "SET", "maxmemory", "8mb")
        assert await store.record("w", answers(claims)) == 1
        assert [file.name for file in await store.list_files()] == ["lines.jsonl"]


async def test_a_redis_that_only_reads(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        batch = await start_batch(store, 1)
        await redis_cli(server, "REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(BatchStoreError):
            await store.cancel(batch.id)
        await redis_cli(server, "REPLICAOF", "NO", "ONE")
        assert (await store.get_batch(batch.id)).status is BatchStatus.IN_PROGRESS


async def test_a_wrong_password_is_not_named(tmp_path: Path) -> None:
    async with redis_server(tmp_path, "--requirepass", "open-sesame") as server:
        async with open_store(server, "wrong-word") as store:
            with pytest.raises(BatchStoreError) as caught:
                await store.list_files()
            assert "wrong-word" not in f"{caught.value} {caught.value.hint} {store!r} {store.description}"
        async with open_store(server, "open-sesame") as store:
            assert await store.list_files() == []


async def test_all_keys_are_the_meshs_own_and_expire(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        batch = await start_batch(store, 9)
        claims = await store.claim("w", 6, lease_s=LONG_S)
        await store.record("w", answers(claims[:1]) + answers(claims[1:2], failed=True))
        await store.release("w", [Release(claims[2], counts=True)])
        read = await store.create_batch(NewBatch(ENDPOINT, batch.new.input_file_id))
        await store.add_requests(read.id, [], [], after_line=0, through_line=1)
        await store.settle()
        keys = (await redis_cli(server, "KEYS", "*")).splitlines()
        assert len(keys) > 12
        for key in keys:
            assert key.startswith(KEYS)
            assert int(await redis_cli(server, "TTL", key)) > 0, key


async def test_batches_and_files_are_kept_for_some_time(tmp_path: Path) -> None:
    hour_s, day_s = 3600, 24 * 3600
    async with redis_server(tmp_path) as server, open_store(server, kept_s=hour_s) as store:
        batch = await start_batch(store, 1)
        file_key = f"{KEYS}file:{batch.new.input_file_id}"
        with contextlib.closing(server.client()) as client:

            def longest_s(pattern: str) -> int:
                """How long the key that lives longest will live."""
                return max(client.ttl(key) for key in client.keys(pattern))

            for pattern in (f"{KEYS}batch:*", f"{file_key}*"):
                assert 2 * day_s < longest_s(pattern) <= 2 * day_s + hour_s, "its window, a day and the hour"
            await store.record("w", answers(await store.claim("w", 1, lease_s=LONG_S)))
            assert 0 < longest_s(f"{KEYS}batch:*") <= hour_s
            assert 2 * day_s < longest_s(f"{file_key}*") <= 2 * day_s + hour_s
            client.delete(*client.keys(f"{KEYS}batch:*"))  # as if their time had come
            with pytest.raises(BatchNotFound):
                await store.get_batch(batch.id)
            assert await store.list_batches() == []
            await store.settle()
            rest = {key.removeprefix(KEYS) for key in (await redis_cli(server, "KEYS", "*")).splitlines()}
        file = f"file:{batch.new.input_file_id}"
        assert rest == {"changes", "swept", "room", "worker:w", "files", file, f"{file}:0"}


async def test_the_parts_of_a_file_that_was_never_whole_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumesh.batches.redis.store.UPLOAD_SILENT_S", 0.05)
    async with redis_server(tmp_path) as server, open_store(server) as store, open_store(server) as other:

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x" * 300_000
            await asyncio.sleep(0.1)
            await other.settle()
            assert "file:" not in await redis_cli(server, "KEYS", "*")
            yield b"x" * 300_000

        with pytest.raises(BatchConflict, match="no part of the file came"):
            await store.create_file("stalled", chunks())
        assert "file" not in await redis_cli(server, "KEYS", "*")


@pytest.mark.parametrize("part", ["", ":work", ":lines", ":output"])
async def test_what_others_have_written_under_our_keys_is_an_error(tmp_path: Path, part: str) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        batch = await start_batch(store, 1)
        await redis_cli(server, "SET", f"{KEYS}batch:{batch.id}{part}", "nonsense")
        reached = 0
        for call in (
            lambda: store.get_batch(batch.id),
            lambda: store.read_results(batch.id),
            lambda: store.read_results_by_line(batch.id),
        ):
            try:
                await call()
            except BatchStoreError as error:
                reached += 1
                assert "Redis" in str(error)
        assert reached > 0


@asynccontextmanager
async def losing_answers(server: RedisServer, folder: Path, function: bytes) -> AsyncIterator[RedisServer]:
    """A relay to the server. It passes the first call of ``function`` on, but closes the connection instead of passing
    the answer back."""
    lost = asyncio.Event()
    relays: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while data := await reader.read(1 << 16):
            if losing.is_set():
                break
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        relays.add(task)
        from_server, to_server = await asyncio.open_unix_connection(server.socket)
        losing = asyncio.Event()
        answering = asyncio.create_task(pump(from_server, writer, losing))
        while data := await reader.read(1 << 16):
            if function in data and not lost.is_set():
                lost.set()
                losing.set()
            to_server.write(data)
        to_server.close()
        await asyncio.gather(answering, return_exceptions=True)

    relay_folder = folder / "relay"
    relay_folder.mkdir(exist_ok=True)
    relayed = RedisServer(relay_folder)
    relayed.socket.unlink(missing_ok=True)
    listening = await asyncio.start_unix_server(relay, relayed.socket)
    try:
        yield relayed
    finally:
        listening.close()
        await asyncio.gather(*relays)
        assert lost.is_set()


async def test_a_call_whose_answer_was_lost_is_repeated_and_does_nothing_twice(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, open_store(server) as store:
        file = await store.create_file("a", one_chunk(b"line"))
        async with losing_answers(server, tmp_path, b"create_batch") as relay, open_store(relay) as relayed:
            made = await relayed.create_batch(NewBatch(ENDPOINT, file.id))
            assert await store.list_batches() == [made]
            await store.cancel(made.id)
        batch = await start_batch(store, 5)
        async with losing_answers(server, tmp_path, b"claim") as relay, open_store(relay) as relayed:
            claims = await relayed.claim("w", 2, lease_s=LONG_S)
            assert [(claim.line, claim.lost) for claim in claims] == [(1, 0), (2, 0)]
            claims += await relayed.claim("w", 2, lease_s=LONG_S)
            assert [(claim.line, claim.lost) for claim in claims[2:]] == [(3, 0), (4, 0)]
        async with losing_answers(server, tmp_path, b"release") as relay, open_store(relay) as relayed:
            await relayed.release("w", [Release(claims[0], counts=True)])
            (again,) = await relayed.claim("w", 1, lease_s=LONG_S)
            assert (again.line, again.tries) == (1, 1)
        async with losing_answers(server, tmp_path, b"record") as relay, open_store(relay) as relayed:
            await relayed.record("w", answers(claims))
        assert (await store.get_batch(batch.id)).counts.completed == 4
        assert [result.line for result in await store.read_results(batch.id)] == [1, 2, 3, 4]


WRONG_ANSWERS = {
    "a number": b":1\r\n",
    "a negative length": b"$-5\r\n",
    "deep": b"*1\r\n" * 3000,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "bytes": b"\xff\r\n",
    "a short list": b"*1\r\n$2\r\nok\r\n",
    "a wrong list": b"*2\r\n$2\r\nok\r\n*1\r\n*2\r\n$1\r\n5\r\n:7\r\n",
}


@pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
async def test_a_server_that_is_no_redis(tmp_path: Path, answer: bytes) -> None:
    served: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        with contextlib.suppress(ConnectionError):
            while commands := await reader.read(1 << 16):
                is_handshake = b"EVAL" not in commands
                writer.write(b"+OK\r\n" * len(re.findall(rb"\*\d+\r\n", commands)) if is_handshake else answer)
        writer.close()

    server = RedisServer(tmp_path)
    listening = await asyncio.start_unix_server(serve, server.socket)
    try:
        async with open_store(server) as store:
            for call in calls_of(store):
                with pytest.raises(BatchStoreError):
                    async with asyncio.timeout(20.0):
                        await call()
    finally:
        listening.close()
        await asyncio.gather(*served)
