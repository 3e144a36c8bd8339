"""A gateway with a store of batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpumesh.batches.base import BatchStore
from gpumesh.batches.engine import BatchWorker
from gpumesh.batches.sqlite.store import SqliteBatchStore
from tests.gateway.fleet import RunningGateway, serve_hosts


@asynccontextmanager
async def serve_batches(folder: Path, *profiles: Any, **more: Any) -> AsyncIterator[tuple[RunningGateway, BatchStore]]:
    """``profiles`` and ``more`` as for ``serve_hosts``."""
    async with (
        SqliteBatchStore(folder / "batches.sqlite") as store,
        serve_hosts(*profiles, batch_store=store, **more) as running,
    ):
        yield running, store


@asynccontextmanager
async def work_on_batches(running: RunningGateway, store: BatchStore) -> AsyncIterator[None]:
    """Works on the batches of the store during the block."""
    worker = BatchWorker(store, running.gateway.batch_sender, count_slots=lambda: 4)
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
