"""What holds for each ``BatchStore``: its files, batches and results. Each test runs on SQLite, and on a real Redis.

Two stores that are open at the same time are as two processes: a mesh and a command, or two gateways.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import (
    MAX_KEPT_ERRORS,
    BatchCounts,
    BatchStatus,
    LineError,
    NewBatch,
    Result,
)
from gpumesh.errors import BatchConflict, BatchNotFound
from tests.batches.stores import (
    ENDPOINT,
    LONG_S,
    OVER_SHORT_S,
    answers,
    one_chunk,
    requests_of,
    start_batch,
    store_lines,
)


async def read_all(store: BatchStore, file_id: str, offset: int = 0, size: int | None = None) -> bytes:
    chunks = [chunk async for chunk in store.read_file(file_id, offset, size)]
    assert all(0 < len(chunk) <= 256 << 10 for chunk in chunks)
    return b"".join(chunks)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (256 << 10) - 1, 256 << 10, (4 << 20) + 77])
async def test_a_file_comes_back_whole_and_in_parts(store: BatchStore, other: BatchStore, size: int) -> None:
    content = random.Random(size).randbytes(size)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 99_991):
            yield content[start : start + 99_991]
            yield b""

    made = await store.create_file("näme \udcff.jsonl", chunks(), owner="a key", purpose="batch")
    assert (made.name, made.size, made.owner, made.purpose) == ("näme ?.jsonl", size, "a key", "batch")
    assert await other.get_file(made.id) == made
    assert await read_all(other, made.id) == content
    for offset, length in ((0, 10), (size // 2, 300_000), (max(0, size - 5), 100), (size, 1), (size + 9, 1), (0, 0)):
        assert await read_all(other, made.id, offset, length) == content[offset : offset + length]
    assert await read_all(other, made.id, size // 3) == content[size // 3 :]


async def test_a_file_is_not_seen_before_it_is_whole_and_leaves_nothing_if_it_never_is(
    store: BatchStore, other: BatchStore
) -> None:
    seen = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 600_000
        seen.append(await other.list_files())
        raise OSError("the client has gone")

    with pytest.raises(OSError, match="the client has gone"):
        await store.create_file("a", chunks())
    assert seen == [[]]
    assert await store.list_files() == []


async def test_files_are_listed_by_their_owners_the_newest_first(store: BatchStore, other: BatchStore) -> None:
    files = [await store.create_file(f"{index}", one_chunk(b"x"), owner="ab"[index % 2]) for index in range(5)]
    assert await other.list_files() == files[::-1]
    assert await other.list_files(owner="a") == files[4::-2]
    assert await other.list_files(limit=2) == [files[4], files[3]]
    assert await other.list_files(after=files[3].id, limit=2) == [files[2], files[1]]
    assert await other.list_files(after=files[3].id, owner="a") == [files[2], files[0]]
    await store.delete_file(files[3].id)
    assert await other.list_files(after=files[3].id) == []
    assert await other.list_files(after=files[0].id) == []


async def test_a_file_is_deleted_unless_a_batch_needs_it(store: BatchStore, other: BatchStore) -> None:
    batch = await start_batch(store, 1)
    file_id = batch.new.input_file_id
    with pytest.raises(BatchConflict):
        await other.delete_file(file_id)
    await store.cancel(batch.id)
    await other.delete_file(file_id)
    for action in (store.get_file, store.delete_file):
        with pytest.raises(BatchNotFound):
            await action(file_id)
    with pytest.raises(BatchConflict, match="file"):
        await store.retry(batch.id)


async def test_a_file_that_is_deleted_while_it_is_read(store: BatchStore, other: BatchStore) -> None:
    made = await store.create_file("a", one_chunk(b"x" * 600_000))
    async with aclosing(store.read_file(made.id)) as chunks:  # type: ignore[type-var]  # it is a generator
        await anext(chunks)
        await other.delete_file(made.id)
        with pytest.raises(BatchNotFound):
            await anext(chunks)


@pytest.mark.parametrize("unknown", ["nothing", "", "a b\n*", "ü:work", "batch_\udcff"])
async def test_unknown_ids(store: BatchStore, unknown: str) -> None:
    with pytest.raises(BatchNotFound):
        await store.get_file(unknown)
    with pytest.raises(BatchNotFound):
        await read_all(store, unknown)
    with pytest.raises(BatchNotFound):
        await store.create_batch(NewBatch(ENDPOINT, unknown))
    for action in (store.get_batch, store.cancel, store.retry, store.delete_batch, store.read_results):
        with pytest.raises(BatchNotFound):
            await action(unknown)
    with pytest.raises(BatchNotFound):
        await store.read_results_by_line(unknown)
    with pytest.raises(BatchNotFound):
        await store.count_recent_results(unknown, 60.0)
    with pytest.raises(BatchNotFound):
        await store.finish_validation(unknown, through_line=0)
    with pytest.raises(BatchNotFound):
        await store.add_requests(unknown, [], [], after_line=0, through_line=1)


# -- batches -----------------------------------------------------------------------------------------------------


async def test_a_new_batch_is_as_it_was_asked_for(store: BatchStore, other: BatchStore) -> None:
    file = await store_lines(store, [b"a"])
    new = NewBatch(ENDPOINT, file.id, "Überschrift", 100.0, "a key", {"of": "the ünit", "empty": ""})
    made = await store.create_batch(new)
    assert (made.new, made.status, made.counts) == (new, BatchStatus.VALIDATING, BatchCounts())
    assert made.expires_at == pytest.approx(made.created_at + 100.0)
    assert (made.in_progress_at, made.cancelling_at, made.ended_at) == (None, None, None)
    assert await other.get_batch(made.id) == made
    assert await other.claim("w", 1, lease_s=LONG_S) == [], "its file is still read"


async def test_batches_are_listed_by_owner_and_status(store: BatchStore, other: BatchStore) -> None:
    file = await store_lines(store, [b"a"])
    made = [await store.create_batch(NewBatch(ENDPOINT, file.id, owner="ab"[index % 2])) for index in range(5)]
    ids = [batch.id for batch in made][::-1]
    await store.cancel(made[2].id)

    async def listed(**choice: object) -> list[str]:
        return [batch.id for batch in await other.list_batches(**choice)]  # type: ignore[arg-type]

    assert await listed() == ids
    assert await listed(owner="a") == ids[::2]
    assert await listed(limit=2) == ids[:2]
    assert await listed(after=ids[1], limit=2) == ids[2:4]
    assert await listed(statuses=[BatchStatus.CANCELLED]) == [made[2].id]
    assert await listed(statuses=[BatchStatus.VALIDATING, BatchStatus.COMPLETED], owner="a") == [ids[0], ids[4]]
    assert await listed(statuses=[]) == []
    assert await listed(after="gone") == []


async def test_lines_are_added_once_and_bad_ones_are_counted(store: BatchStore, other: BatchStore) -> None:
    lines = [b"one", b"two", b"three"]
    batch = await store.create_batch(NewBatch(ENDPOINT, (await store_lines(store, lines)).id))
    requests = requests_of(lines)
    errors = [LineError(line, "bad", f"so bad: {line} \udcff") for line in range(4, 4 + MAX_KEPT_ERRORS + 10)]
    assert await store.add_requests(batch.id, requests[:2], errors[:5], after_line=0, through_line=8)
    for after_line in (0, 7, 9):
        assert not await other.add_requests(batch.id, requests[:2], [], after_line=after_line, through_line=10)
    assert await other.add_requests(batch.id, requests[2:], errors[5:], after_line=8, through_line=200)
    assert (await other.finish_validation(batch.id, through_line=199)).status is BatchStatus.VALIDATING
    read = await other.finish_validation(batch.id, through_line=200)
    assert (read.status, read.counts.total, read.read_lines) == (BatchStatus.IN_PROGRESS, 3, 200)
    assert read.in_progress_at is not None
    assert [(error.line, error.code) for error in read.errors] == [(line, "bad") for line in range(4, 104)]
    assert read.errors[0].message == "so bad: 4 ?"
    assert read.error_count == MAX_KEPT_ERRORS + 10
    assert (await other.finish_validation(batch.id, through_line=200)).status is BatchStatus.IN_PROGRESS
    assert not await other.add_requests(batch.id, requests, [], after_line=200, through_line=201)
    claims = await store.claim("w", 9, lease_s=LONG_S)
    assert [claim.content for claim in claims] == lines


async def test_a_batch_without_a_good_line_has_failed(store: BatchStore) -> None:
    batch = await store.create_batch(NewBatch(ENDPOINT, (await store_lines(store, [b"x"])).id))
    await store.add_requests(batch.id, [], [LineError(1, "bad", "bad")], after_line=0, through_line=1)
    failed = await store.finish_validation(batch.id, through_line=1)
    assert failed.status is BatchStatus.FAILED
    assert failed.ended_at is not None
    for action in (store.retry, store.cancel):
        with pytest.raises(BatchConflict):
            await action(batch.id)
    await store.delete_batch(batch.id)


# -- results -----------------------------------------------------------------------------------------------------


async def test_results_are_read_in_the_order_of_their_recording_and_by_line(
    store: BatchStore, other: BatchStore
) -> None:
    batch = await start_batch(store, 30)
    claims = await store.claim("w", 30, lease_s=LONG_S)
    order = random.Random(3).sample(range(30), 30)
    failed_lines = {line for line in range(1, 31) if line % 3 == 0}
    for index in order[:20]:
        await store.record("w", answers([claims[index]], failed=claims[index].line in failed_lines))

    async def read(failed: bool | None, limit: int = 7, after: str = "") -> list[int]:
        lines = []
        while results := await other.read_results(batch.id, after=after, limit=limit, failed=failed):
            assert len(results) <= limit
            assert all(result.content == b"answer %d" % result.line for result in results)
            assert all(result.failed == (result.line in failed_lines) for result in results)
            lines += [result.line for result in results]
            after = results[-1].position
        return lines

    recorded = [claims[index].line for index in order]
    assert await read(None) == recorded[:20]
    assert await read(False) == [line for line in recorded[:20] if line not in failed_lines]
    assert await read(True) == [line for line in recorded[:20] if line in failed_lines]
    newest = (await other.read_results(batch.id))[-1].position
    assert await read(None, after=newest) == []
    for index in order[20:]:
        await store.record("w", answers([claims[index]], failed=claims[index].line in failed_lines))
    assert await read(None, after=newest) == recorded[20:]

    by_line: list[int] = []
    while results := await other.read_results_by_line(batch.id, after_line=by_line[-1] if by_line else 0, limit=8):
        assert all(result.content == b"answer %d" % result.line for result in results)
        by_line += [result.line for result in results]
    assert by_line == list(range(1, 31))
    newest = (await other.read_results(batch.id))[-1].position
    await store.retry(batch.id)
    assert await other.read_results(batch.id, after=newest) == []
    (again, *_) = await store.claim("w", 30, lease_s=LONG_S)
    await store.record("w", answers([again]))
    assert [result.line for result in await other.read_results(batch.id, after=newest)] == [3]
    assert [result.line for result in await other.read_results_by_line(batch.id, limit=3)] == [1, 2, 3]


async def test_contents_of_any_bytes_and_sizes(store: BatchStore, other: BatchStore) -> None:
    lines = [b"\0\xff\r \xf0", b"x" * 3_000_000, b"y" * 3_000_000, b"z"]
    batch = await store.create_batch(NewBatch(ENDPOINT, (await store_lines(store, lines)).id))
    await store.add_requests(batch.id, requests_of(lines), [], after_line=0, through_line=4)
    await store.finish_validation(batch.id, through_line=4)
    contents: list[bytes] = []
    while claims := await store.claim("w", 9, lease_s=LONG_S):
        contents += [claim.content for claim in claims]
        await store.record("w", [Result(claim, claim.content) for claim in claims])
    assert contents == lines
    position, recorded = "", []
    while results := await other.read_results(batch.id, after=position):
        recorded += [result.content for result in results]
        position = results[-1].position
    assert recorded == lines
    assert (await other.get_batch(batch.id)).counts.output_bytes == sum(map(len, lines)) + 4


# -- others ------------------------------------------------------------------------------------------------------


async def test_a_store_notices_a_batch_of_another_process(store: BatchStore, other: BatchStore) -> None:
    file = await store_lines(store, [b"a"])
    async with asyncio.timeout(20.0):
        await other.wait_for_change(0.01)  # of what was before
        waiting = asyncio.create_task(other.wait_for_change(30.0))
        await asyncio.sleep(OVER_SHORT_S)
        assert not waiting.done()
        await store.create_batch(NewBatch(ENDPOINT, file.id))
        await waiting
        await other.wait_for_change(0.01)
