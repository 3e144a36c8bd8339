"""``SqliteBatchStore``: the batches of one mesh.yaml in a SQLite file, which the mesh and commands use at the same
time. Only one mesh works on them: the one that has the mesh's lock.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from gpumesh.batches.result_files import BATCH_PREFIX, FILE_PREFIX
from gpumesh.batches.sqlite import batches, files, requests
from gpumesh.batches.sqlite.database import Database
from gpumesh.batches.values import (
    COMMAND_LINE,
    KEPT_S,
    Batch,
    BatchStatus,
    Claim,
    LineError,
    NewBatch,
    NewRequest,
    RecordedResult,
    Release,
    Result,
    StoredFile,
)
from gpumesh.errors import BatchStoreError

CHANGE_POLL_S = 0.25  # between two looks whether another process has changed the file; one takes some microseconds
CHUNKS_AT_A_TIME = 2  # chunks of a new file that are written in one transaction: about 1 ms
REMOVAL_INTERVAL_S = 60.0  # between two looks for what is to be removed
MAX_WRITING_S = 24 * 3600.0  # a file that is not whole after this time never will be
_ID_BYTES = 12


class SqliteBatchStore:
    """The store in the file at ``path``. ``clock`` returns seconds since 1970."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._database = Database(path)
        self._clock = clock
        self._has_changed = asyncio.Event()  # by this process
        self._seen_version = -1
        self._next_removal_at = 0.0

    def __repr__(self) -> str:
        return f"<SqliteBatchStore {self._database!r}>"

    @property
    def is_shared(self) -> bool:
        return False

    @property
    def description(self) -> str:
        return str(self._database.path)

    async def __aenter__(self) -> Self:
        await self._database.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close_connection()

    # -- files ---------------------------------------------------------------------------------------------------

    async def create_file(
        self, name: str, chunks: AsyncIterable[bytes], *, owner: str = COMMAND_LINE, purpose: str = "batch"
    ) -> StoredFile:
        file_id, now = FILE_PREFIX + secrets.token_hex(_ID_BYTES), self._clock()
        number = await self._database.write(
            lambda connection: files.begin_file(connection, file_id, name, purpose, owner, now)
        )
        first = 0
        try:
            async for group in _regroup(chunks):
                await self._add_chunks(number, first, group)
                first += len(group)
            return await self._database.write(lambda connection: files.finish_file(connection, number))
        except BaseException:
            with suppress(BatchStoreError):  # ``settle`` removes what is left
                await self._remove_file(number)
            raise

    async def _add_chunks(self, number: int, first: int, group: list[bytes]) -> None:
        await self._database.write(lambda connection: files.add_chunks(connection, number, first, group))
        await asyncio.sleep(0)

    async def get_file(self, file_id: str) -> StoredFile:
        _, file = await self._database.read(lambda connection: files.find_file(connection, file_id))
        return file

    async def list_files(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[StoredFile]:
        return await self._database.read(lambda connection: files.list_files(connection, owner, after, limit))

    async def read_file(self, file_id: str, offset: int = 0, size: int | None = None) -> AsyncIterator[bytes]:
        end = None if size is None else offset + size
        while True:
            number, file = await self._database.read(lambda connection: files.find_file(connection, file_id))
            end = file.size if end is None else min(end, file.size)
            if offset >= end:
                return
            piece = await self._read_piece(number, offset, min(end - offset, files.CHUNK_BYTES))
            offset += len(piece)
            yield piece

    async def _read_piece(self, number: int, offset: int, size: int) -> bytes:
        return await self._database.read(lambda connection: files.read_range(connection, number, offset, size))

    async def delete_file(self, file_id: str) -> None:
        number = await self._database.write(lambda connection: files.mark_deleted(connection, file_id))
        await self._remove_file(number)

    async def _remove_file(self, number: int) -> None:
        await self._database.write_in_pieces(lambda connection: files.remove_chunks(connection, number))

    # -- batches -------------------------------------------------------------------------------------------------

    async def create_batch(self, new: NewBatch) -> Batch:
        batch_id = BATCH_PREFIX + secrets.token_hex(_ID_BYTES)
        batch = await self._database.write(
            lambda connection: batches.add_batch(connection, batch_id, new, self._clock())
        )
        self._has_changed.set()
        return batch

    async def get_batch(self, batch_id: str) -> Batch:
        return await self._database.read(lambda connection: batches.get_batch(connection, batch_id, self._clock()))

    async def list_batches(
        self,
        *,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 100,
        statuses: Collection[BatchStatus] | None = None,
    ) -> list[Batch]:
        return await self._database.read(
            lambda connection: batches.list_batches(connection, owner, after, limit, statuses, self._clock())
        )

    async def cancel(self, batch_id: str) -> Batch:
        batch = await self._database.write(lambda connection: batches.cancel_batch(connection, batch_id, self._clock()))
        self._has_changed.set()
        return batch

    async def retry(self, batch_id: str) -> Batch:
        reopened = await self._database.write(
            lambda connection: batches.reopen_batch(connection, batch_id, self._clock())
        )
        if reopened is not None:
            number, position = reopened
            await self._database.write_in_pieces(
                lambda connection: requests.reopen_failed(connection, number, position, self._clock())
            )
            self._has_changed.set()
        return await self.get_batch(batch_id)

    async def delete_batch(self, batch_id: str) -> None:
        number = await self._database.write(
            lambda connection: batches.mark_deleted(connection, batch_id, self._clock())
        )
        await self._remove_batch(number)

    async def _remove_batch(self, number: int) -> None:
        await self._database.write_in_pieces(lambda connection: batches.remove_rows(connection, number))

    async def count_recent_results(self, batch_id: str, seconds: float) -> int:
        return await self._database.read(
            lambda connection: requests.count_recent_results(connection, batch_id, self._clock() - seconds)
        )

    # -- the requests of a new batch -----------------------------------------------------------------------------

    async def add_requests(
        self,
        batch_id: str,
        requests: Sequence[NewRequest],
        errors: Sequence[LineError],
        *,
        after_line: int,
        through_line: int,
    ) -> bool:
        return await self._database.write(
            lambda connection: batches.add_requests(
                connection, batch_id, requests, errors, after_line=after_line, through_line=through_line
            )
        )

    async def finish_validation(self, batch_id: str, *, through_line: int) -> Batch:
        batch = await self._database.write(
            lambda connection: batches.finish_validation(connection, batch_id, through_line, self._clock())
        )
        self._has_changed.set()
        return batch

    # -- work ----------------------------------------------------------------------------------------------------

    async def begin_work(self, worker: str) -> None:  # noqa: ARG002 - the only worker needs no name here
        await self._database.write(requests.free_claims)

    async def claim(self, worker: str, count: int, *, lease_s: float, without: Collection[str] = ()) -> list[Claim]:
        rows = await self._database.write(
            lambda connection: requests.claim_requests(connection, worker, count, lease_s, without, self._clock())
        )
        return [await self._read_claim(row) for row in rows]

    async def _read_claim(self, row: requests.ClaimedRow) -> Claim:
        content = await self._database.read(lambda connection: requests.read_content(connection, row))
        return replace(row.claim, content=content)

    async def renew(self, worker: str, claims: Collection[Claim], *, lease_s: float) -> set[tuple[str, int]]:
        return await self._database.write(
            lambda connection: requests.renew_claims(connection, worker, claims, lease_s, self._clock())
        )

    async def release(self, worker: str, releases: Sequence[Release]) -> None:
        await self._database.write(
            lambda connection: requests.release_claims(connection, worker, releases, self._clock())
        )

    async def record(self, worker: str, results: Sequence[Result]) -> int:  # noqa: ARG002 - a result of any worker counts
        return await self._database.write(
            lambda connection: requests.record_results(connection, results, self._clock())
        )

    async def settle(self) -> None:
        now = self._clock()
        await self._database.write(lambda connection: batches.end_cancelled(connection, now))
        if now < self._next_removal_at:
            return
        self._next_removal_at = now + REMOVAL_INTERVAL_S
        while (number := await self._find_removable_batch(now)) is not None:
            await self._remove_batch(number)
        while (number := await self._find_removable_file(now)) is not None:
            await self._remove_file(number)

    async def _find_removable_batch(self, now: float) -> int | None:
        return await self._database.write(
            lambda connection: batches.find_removable_batch(connection, ended_before=now - KEPT_S)
        )

    async def _find_removable_file(self, now: float) -> int | None:
        return await self._database.write(
            lambda connection: files.find_removable_file(
                connection, unused_before=now - KEPT_S, begun_before=now - MAX_WRITING_S
            )
        )

    async def wait_for_change(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        with suppress(BatchStoreError):
            while not self._has_changed.is_set() and self._database.data_version() == self._seen_version:
                pause_s = min(CHANGE_POLL_S, ends_at - loop.time())
                if pause_s <= 0.0:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._has_changed.wait()
            self._seen_version = self._database.data_version()
            self._has_changed.clear()

    # -- results -------------------------------------------------------------------------------------------------

    async def read_results(
        self, batch_id: str, *, after: str = "", limit: int = 100, failed: bool | None = None
    ) -> list[RecordedResult]:
        return await self._database.read(
            lambda connection: requests.read_results(connection, batch_id, after, limit, failed)
        )

    async def read_results_by_line(
        self, batch_id: str, *, after_line: int = 0, limit: int = 100
    ) -> list[RecordedResult]:
        return await self._database.read(
            lambda connection: requests.read_results_by_line(connection, batch_id, after_line, limit)
        )


async def _regroup(chunks: AsyncIterable[bytes]) -> AsyncIterator[list[bytes]]:
    """The same bytes in lists of chunks of ``CHUNK_BYTES``, of which only the last one is shorter."""
    buffer = bytearray()
    group_bytes = files.CHUNK_BYTES * CHUNKS_AT_A_TIME
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= group_bytes:
            yield _cut(bytes(buffer[:group_bytes]))
            del buffer[:group_bytes]
    if buffer:
        yield _cut(bytes(buffer))


def _cut(data: bytes) -> list[bytes]:
    """The data in chunks of ``CHUNK_BYTES``."""
    return [data[begin : begin + files.CHUNK_BYTES] for begin in range(0, len(data), files.CHUNK_BYTES)]
