"""Follows a batch until it ends: its progress, or its results as they come. A store that is away is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from time import time
from typing import TypeVar

from gpumesh.batches.base import BatchStore
from gpumesh.batches.progress import BatchProgress, measure_progress
from gpumesh.batches.reasons import find_errors, find_wait
from gpumesh.batches.values import Batch
from gpumesh.cli.batch.result_output import WriteLines
from gpumesh.errors import BatchStoreError

T = TypeVar("T")

INTERVAL_S = 1.0  # between two looks at a batch that goes on, and at a store that is away
RESULTS_AT_A_TIME = 200


class PatientReader:
    """Reads from a store again and again until that works. ``on_away`` is called when the store is found away, with its
    error; not again before a reading has worked. ``interval_s``: the seconds between two looks."""

    def __init__(self, on_away: Callable[[BatchStoreError], None], *, interval_s: float = INTERVAL_S) -> None:
        self._on_away = on_away
        self._interval_s = interval_s
        self._is_away = False

    async def read(self, read: Callable[[], Awaitable[T]]) -> T:
        """What ``read`` returns. Raises the errors of ``read`` other than BatchStoreError."""
        while True:
            try:
                result = await read()
            except BatchStoreError as error:
                if not self._is_away:
                    self._is_away = True
                    self._on_away(error)
                await self.pause()
            else:
                self._is_away = False
                return result

    async def pause(self) -> None:
        """Waits until the next look."""
        await asyncio.sleep(self._interval_s)


async def measure_with_wait(store: BatchStore, batch: Batch) -> BatchProgress:
    """How far the batch is now, and which batch it waits for. Raises BatchError."""
    progress = await measure_progress(store, batch, time())
    return replace(progress, wait=await find_wait(store, batch))


async def add_errors(store: BatchStore, progress: BatchProgress) -> BatchProgress:
    """The same progress, with what the failed requests have failed with. Raises BatchError."""
    return replace(progress, errors=await find_errors(store, progress.batch))


async def follow_progress(store: BatchStore, batch_id: str, reader: PatientReader) -> AsyncIterator[BatchProgress]:
    """Yields the batch now and at each look of the ``reader``, until it has ended. Raises BatchNotFound when it is
    deleted."""

    async def measure() -> BatchProgress:
        return await measure_with_wait(store, await store.get_batch(batch_id))

    while True:
        progress = await reader.read(measure)
        yield progress
        if progress.batch.status.has_ended:
            return
        await reader.pause()


@dataclass(slots=True)
class CopiedResults:
    """How many results were written, and how many of them have failed."""

    written: int = 0
    failed: int = 0


async def copy_results(store: BatchStore, batch: Batch, write: WriteLines, *, only_failed: bool) -> CopiedResults:
    """Writes the results that there are now, in the order of the lines of the file. With ``only_failed`` no others than
    those that have failed. Raises BatchError and OSError."""
    copied, line = CopiedResults(), 0
    while results := await store.read_results_by_line(batch.id, after_line=line, limit=RESULTS_AT_A_TIME):
        line = results[-1].line
        chosen = [result for result in results if result.failed] if only_failed else results
        write([result.content for result in chosen])
        copied.written += len(chosen)
        copied.failed += sum(result.failed for result in chosen)
    return copied


async def follow_results(
    store: BatchStore, batch: Batch, write: WriteLines, reader: PatientReader, *, only_failed: bool
) -> CopiedResults:
    """Writes the results in the order in which they come, until the batch has ended. ``only_failed``: as in
    ``copy_results``. Raises BatchNotFound when the batch is deleted, and OSError."""
    copied, position = CopiedResults(), ""
    failed = True if only_failed else None
    while True:
        # Looked at before the results are read: what is recorded before the end is read then.
        has_ended = (await reader.read(lambda: store.get_batch(batch.id))).status.has_ended
        while results := await reader.read(
            lambda: store.read_results(batch.id, after=position, limit=RESULTS_AT_A_TIME, failed=failed)  # noqa: B023
        ):
            position = results[-1].position
            write([result.content for result in results])
            copied.written += len(results)
            copied.failed += sum(result.failed for result in results)
        if has_ended:
            return copied
        await reader.pause()
