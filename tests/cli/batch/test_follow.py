"""A batch that is followed while a worker records its results, also while its store is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.batches.base import BatchStore
from gpumesh.batches.progress import BatchProgress
from gpumesh.batches.reasons import MAX_READ_RESULTS, UNREADABLE, BatchWait, SeenError, find_wait, read_error
from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchStatus, NewBatch, Result
from gpumesh.cli.batch.changes import cancel_batch, remove_batch
from gpumesh.cli.batch.follow import PatientReader, add_errors, copy_results, follow_progress, follow_results
from gpumesh.errors import BatchConflict, BatchNotFound, BatchStoreError

REQUESTS = 500


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BatchStore]:
    async with SqliteBatchStore(tmp_path / "batches.sqlite") as opened:
        await opened.begin_work("worker")
        yield opened


async def make_batch(store: BatchStore) -> Batch:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'"why?"\n' * REQUESTS

    file = await store.create_file("in.jsonl", chunks())
    return await validate_batch(store, (await store.create_batch(NewBatch(PROMPT_ENDPOINT, file.id))).id)


async def work(store: BatchStore, count: int) -> None:
    """Records a result for ``count`` requests; each tenth has failed."""
    claims = await store.claim("worker", count, lease_s=30.0)
    results = [Result(claim, str(claim.line).encode(), failed=claim.line % 10 == 0) for claim in claims]
    await store.record("worker", results)


def eager_reader() -> PatientReader:
    return PatientReader(lambda error: pytest.fail(str(error)), interval_s=0.0)


@pytest.mark.parametrize("only_failed", [False, True])
async def test_each_result_is_written_once_however_they_come(store: BatchStore, only_failed: bool) -> None:
    batch = await make_batch(store)
    written: list[bytes] = []

    async def work_until_end() -> None:
        while not (await store.get_batch(batch.id)).status.has_ended:
            await work(store, 37)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(work_until_end())
        copied = await follow_results(store, batch, written.extend, eager_reader(), only_failed=only_failed)
    expected = [line for line in range(1, REQUESTS + 1) if not only_failed or line % 10 == 0]
    assert sorted(map(int, written)) == expected
    assert (copied.written, copied.failed) == (len(expected), REQUESTS // 10)
    in_order: list[bytes] = []
    assert await copy_results(store, batch, in_order.extend, only_failed=only_failed) == copied
    assert list(map(int, in_order)) == expected


async def test_progress_ends_with_the_batch_or_when_it_is_removed(store: BatchStore) -> None:
    batch = await make_batch(store)
    seen = []
    async for progress in follow_progress(store, batch.id, eager_reader()):
        seen.append(progress)
        await work(store, 200)
    assert [progress.batch.counts.unfinished for progress in seen] == [500, 300, 100, 0]
    assert seen[-1].batch.status is BatchStatus.COMPLETED
    assert seen[1].rate_per_s
    await store.delete_batch(batch.id)
    with pytest.raises(BatchNotFound):
        await anext(follow_progress(store, batch.id, eager_reader()))


async def test_the_errors_are_those_of_the_first_failed_results(store: BatchStore) -> None:
    batch = await make_batch(store)
    claims = await store.claim("worker", 300, lease_s=30.0)
    await store.record("worker", [Result(claim, b'{"error": "early"}', failed=True) for claim in claims[:50]])
    await store.record("worker", [Result(claim, b'{"error": null}') for claim in claims[50:100]])
    await store.record("worker", [Result(claim, b'{"error": "late"}', failed=True) for claim in claims[100:]])
    errors = (await add_errors(store, BatchProgress(await store.get_batch(batch.id)))).errors
    assert errors is not None
    assert errors.read_count == MAX_READ_RESULTS
    assert errors.errors == (SeenError("late", MAX_READ_RESULTS - 50), SeenError("early", 50))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (b'{"error": "no\\u001b[31m red\\nline"}', "no red line"),
        (b'{"error": {"code": "x", "message": "late"}, "response": null}', "late"),
        (
            b'{"error": null, "response": {"status_code": 400, "body": {"error": {"message": "long"}}}}',
            "status 400: long",
        ),
        (
            b'{"response": {"status_code": 502, "body": "<html><title>Bad\\u0007 gateway</title>"}}',
            'status 502: a web page, "Bad gateway"',
        ),
        (b'{"response": {"status_code": [], "body": 5}}', "status ?: an error without words"),
        (b'{"response": 5}', UNREADABLE),
        (b'{"error": ' + b"[" * 5000, UNREADABLE),
        (b"\xff", UNREADABLE),
    ],
)
def test_the_message_of_a_failed_result_is_printable(result: bytes, message: str) -> None:
    assert read_error(result) == message
    assert len(read_error(result.replace(b"long", b"long" * 1000))) < 400


async def test_a_batch_waits_behind_the_older_one_that_is_worked_on(store: BatchStore) -> None:
    first, second, third = [await make_batch(store) for _ in range(3)]
    assert await find_wait(store, third) is None  # nothing is worked on
    await store.claim("worker", 10, lease_s=30.0)
    assert await find_wait(store, third) == BatchWait(first.id, 2)
    assert await find_wait(store, second) == BatchWait(first.id, 1)
    assert await find_wait(store, await store.get_batch(first.id)) is None
    await store.claim("worker", REQUESTS, lease_s=30.0)  # all of the first, and some of the second
    assert await find_wait(store, await store.get_batch(second.id)) is None
    await cancel_batch(store, third)
    assert await find_wait(store, await store.get_batch(third.id)) is None


async def test_a_file_is_removed_with_the_last_batch_of_the_command_line_that_has_it(store: BatchStore) -> None:
    first = await make_batch(store)
    new = first.new
    second = await validate_batch(store, (await store.create_batch(new)).id)
    of_key = await validate_batch(store, (await store.create_batch(replace(new, owner="nightly"))).id)
    with pytest.raises(BatchConflict, match="has not ended yet"):
        await remove_batch(store, first)
    for batch in (first, second, of_key):
        await remove_batch(store, await cancel_batch(store, batch))
        assert [file.id for file in await store.list_files()] == [new.input_file_id]
    third = await cancel_batch(store, await validate_batch(store, (await store.create_batch(new)).id))
    assert third.status is BatchStatus.CANCELLED
    await remove_batch(store, third)
    assert await store.list_files() == []


async def test_a_store_that_is_away_is_waited_for_and_told_once_each_time() -> None:
    answers = iter(["away", "away", "one", "away again", "two"])

    async def read() -> str:
        answer = next(answers)
        if answer.startswith("away"):
            raise BatchStoreError(answer)
        return answer

    told: list[str] = []
    reader = PatientReader(lambda error: told.append(error.message), interval_s=0.0)
    assert [await reader.read(read), await reader.read(read)] == ["one", "two"]
    assert told == ["away", "away again"]
