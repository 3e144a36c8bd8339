"""A submission that is stopped midway leaves no batch that a mesh would go on with."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.values import BatchStatus
from gpumesh.cli.batch.submit import submit_file
from gpumesh.cli.batch.submitted_file import PromptSettings, SubmittedFile
from gpumesh.errors import BatchStoreError
from tests.batches.test_sqlite_store import set_page_limit

LINES = 5000


async def test_ctrl_c_cancels_the_batch(tmp_path: Path) -> None:
    submitted = SubmittedFile(io.BytesIO(b"why?\n" * LINES), PromptSettings(), name="in.txt")
    async with SqliteBatchStore(tmp_path / "batches.sqlite") as store:
        submission = asyncio.create_task(submit_file(store, submitted, name="in.txt", window_s=60.0))
        while not (batches := await store.list_batches()):
            await asyncio.sleep(0)
        assert batches[0].status is BatchStatus.VALIDATING
        submission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submission
        await store.settle()
        (batch,) = await store.list_batches()
        assert batch.status is BatchStatus.CANCELLED
        assert batch.counts.total < LINES
        assert await store.claim("worker", 1, lease_s=1.0) == []


async def test_a_store_that_is_full_in_the_midst_of_it_cancels_the_batch(tmp_path: Path) -> None:
    """The command fails, so a person submits the file once more."""
    submitted = SubmittedFile(io.BytesIO(b"why?\n" * LINES), PromptSettings(), name="in.txt")
    async with SqliteBatchStore(tmp_path / "batches.sqlite") as store:
        submission = asyncio.create_task(submit_file(store, submitted, name="in.txt", window_s=60.0))
        while not await store.list_batches():
            await asyncio.sleep(0)
        await set_page_limit(store, 1)
        with pytest.raises(BatchStoreError, match="the disk is full"):
            await submission
        await store.settle()
        (batch,) = await store.list_batches()
        assert batch.status is BatchStatus.CANCELLED
        assert batch.counts.total < LINES
