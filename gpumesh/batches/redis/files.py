"""``RedisFiles``: the files of a ``BatchStore`` in Redis."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterable, AsyncIterator

from gpumesh.batches.redis.answers import read_files, read_stored_file
from gpumesh.batches.redis.script import RedisScript
from gpumesh.batches.values import COMMAND_LINE, StoredFile
from gpumesh.errors import BatchStoreError

SEGMENT_BYTES = (256 << 10) - 64  # as in lua/common.lua
UPLOAD_SILENT_S = 3600.0  # when no part of a file came for so long, its upload has ended


class RedisFiles:
    """``kept_s``: so long a file is kept after its last use."""

    def __init__(self, script: RedisScript, *, kept_s: float) -> None:
        self._script = script
        self._kept_s = kept_s

    async def create_file(
        self, name: str, chunks: AsyncIterable[bytes], *, owner: str = COMMAND_LINE, purpose: str = "batch"
    ) -> StoredFile:
        file_id = f"file-{secrets.token_hex(12)}"
        try:
            number = size = 0
            async for segment in _cut_segments(chunks):
                await self._script.call("put_segment", file_id, number, segment)
                number, size = number + 1, size + len(segment)
            fields = ("name", name, "size", size, "purpose", purpose, "owner", owner)
            answer = await self._script.ask("finish_upload", file_id, self._kept_s, *fields)
        except BaseException:
            await self._drop_upload(file_id)
            raise
        return read_stored_file(file_id, answer)

    async def _drop_upload(self, file_id: str) -> None:
        """Removes the parts of a file, also when this task was cancelled. If Redis is away, ``settle`` of any gateway
        removes them later."""
        with contextlib.suppress(BatchStoreError):
            await self._script.call("drop_upload", file_id)

    async def get_file(self, file_id: str) -> StoredFile:
        answer = await self._script.ask("get_file", file_id)
        return read_stored_file(file_id, answer)

    async def list_files(
        self, *, owner: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[StoredFile]:
        every_owner = "1" if owner is None else "0"
        answer = await self._script.ask("list_files", owner or "", every_owner, after or "", limit)
        return read_files(answer)

    async def read_file(self, file_id: str, offset: int = 0, size: int | None = None) -> AsyncIterator[bytes]:
        file_size = (await self.get_file(file_id)).size
        end = file_size if size is None else min(file_size, offset + size)
        while offset < end:
            piece = await self._script.ask("read_piece", file_id, offset, min(SEGMENT_BYTES, end - offset))
            if not piece:
                raise BatchStoreError(f"Redis does not have all of the file {file_id} any more")
            yield piece
            offset += len(piece)

    async def delete_file(self, file_id: str) -> None:
        await self._script.call("delete_file", file_id)


async def _cut_segments(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in segments of ``SEGMENT_BYTES``; the last one may be shorter, and an empty file has one."""
    buffer = bytearray()
    is_first = True
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) > SEGMENT_BYTES:
            yield bytes(buffer[:SEGMENT_BYTES])
            del buffer[:SEGMENT_BYTES]
            is_first = False
    if buffer or is_first:
        yield bytes(buffer)
