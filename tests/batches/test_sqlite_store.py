"""What only the SQLite store does: its file, other processes, a full disk, damage. The rest is the contract of all
stores (``test_store_contract.py``)."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from gpumesh.batches.sqlite.database import CHECKPOINT_BYTES, Database
from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchStatus, NewBatch, Result
from gpumesh.errors import BatchStoreError


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def submit(store: SqliteBatchStore, *lines: str) -> Batch:
    """A batch of prompts that can be claimed."""
    file = await store.create_file("in.jsonl", chunks("".join(line + "\n" for line in lines).encode()))
    batch = await store.create_batch(NewBatch(PROMPT_ENDPOINT, file.id))
    return await validate_batch(store, batch.id)


async def test_files_belong_to_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "batches" / "a.sqlite"
    async with SqliteBatchStore(path) as store:
        await submit(store, '"one"')
        files = list(path.parent.iterdir())
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_a_file_of_another_program_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (a)")
    before = path.read_bytes()
    with pytest.raises(BatchStoreError, match=r"other\.sqlite, .* another program"):
        await SqliteBatchStore(path).__aenter__()
    assert path.read_bytes() == before


async def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")
    with pytest.raises(BatchStoreError, match=r"a\.sqlite, .* newer version"):
        await SqliteBatchStore(path).__aenter__()


async def test_a_file_that_was_moved_away_is_not_written_to(tmp_path: Path) -> None:
    """What is written to it would be lost, and no command would see it."""
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path) as store:
        path.rename(tmp_path / "old.sqlite")
        with pytest.raises(BatchStoreError, match=r"a\.sqlite was moved away"):
            await store.settle()
        async with SqliteBatchStore(path) as other:
            await other.settle()
            with pytest.raises(BatchStoreError, match="replaced"):
                await store.settle()


async def test_a_damaged_file_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(BatchStoreError, match="damaged") as caught:
        await SqliteBatchStore(path).__aenter__()
    assert str(path) in (caught.value.hint or "")
    assert path.read_bytes().startswith(b"no database")


async def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A result that cannot be stored is an error, and can be stored when there is room again."""
    async with SqliteBatchStore(tmp_path / "a.sqlite") as store:
        batch = await submit(store, '"one"', '"two"')
        first, second = await store.claim("w", 2, lease_s=60.0)
        await set_page_limit(store, 1)
        with pytest.raises(BatchStoreError, match="the disk is full"):
            await store.record("w", [Result(first, b"x" * 100_000)])
        with pytest.raises(BatchStoreError, match="the disk is full"):
            await store.create_file("more", chunks(b"x" * 1_000_000))
        assert (await store.get_batch(batch.id)).counts.completed == 0
        await set_page_limit(store, 1_000_000)
        assert await store.record("w", [Result(first, b"1"), Result(second, b"2")]) == 2
        assert (await store.get_batch(batch.id)).status is BatchStatus.COMPLETED
        assert [result.content for result in await store.read_results(batch.id)] == [b"1", b"2"]
        assert [file.name for file in await store.list_files()] == ["in.jsonl"]


async def set_page_limit(store: SqliteBatchStore, pages: int) -> None:
    """Lets the file have no more pages than it has already, or so many: SQLite then says that the disk is full."""
    await store._database.read(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())


async def test_another_process_that_writes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path) as store, asyncio.TaskGroup() as group:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            task = group.create_task(submit(store, '"one"'))
            await asyncio.sleep(0.02)
            assert not task.done()
            other.execute("COMMIT")
            assert (await task).counts.total == 1


async def test_a_change_of_another_process_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path) as mesh, SqliteBatchStore(path) as command, asyncio.TaskGroup() as group:
        await mesh.wait_for_change(0.01)
        waiting = group.create_task(mesh.wait_for_change(30.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await submit(command, '"one"')
        async with asyncio.timeout(5.0):
            await waiting


async def test_the_file_of_commits_is_folded(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path) as store:
        for _ in range(4):
            await store.create_file("big", chunks(b"x" * CHECKPOINT_BYTES))
        assert (tmp_path / "a.sqlite-wal").stat().st_size < 3 * CHECKPOINT_BYTES


async def test_claims_of_a_large_batch_need_no_scan_and_no_sort(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.sqlite")
    await database.open()
    query = (
        "EXPLAIN QUERY PLAN SELECT line, start, size, prompt_group, tries, lost FROM requests WHERE batch = ?"
        " AND has_result = 0 AND worker IS NULL AND (not_before <= ? OR ? > ?) ORDER BY sort, line LIMIT ?"
    )
    plan = await database.read(lambda connection: connection.execute(query, (1, 0, 0, 0, 1)).fetchall())
    text = " ".join(str(row[-1]) for row in plan)
    assert "open_requests" in text
    assert "B-TREE" not in text
    database.close_connection()


async def test_a_worker_that_begins_frees_what_a_killed_one_had(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    async with SqliteBatchStore(path) as store:
        await submit(store, '"one"')
        assert len(await store.claim("killed", 5, lease_s=3600.0)) == 1
    async with SqliteBatchStore(path) as store:
        await store.begin_work("new")
        (claim,) = await store.claim("new", 5, lease_s=3600.0)
        assert (claim.lost, claim.tries, claim.content) == (1, 0, b'"one"')
