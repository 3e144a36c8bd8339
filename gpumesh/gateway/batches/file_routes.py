"""``/v1/files``: the files that clients upload for batches, and the files with the results of batches."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator

from gpumesh.backends import safe_json
from gpumesh.batches.base import BatchStore
from gpumesh.batches.result_files import ResultFileId, parse_result_file_id, read_result_file
from gpumesh.batches.values import StoredFile
from gpumesh.errors import BatchConflict, BatchNotFound
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.gateway.batches.documents import (
    ID_PATTERN,
    Document,
    describe_file,
    describe_list,
    result_files,
)
from gpumesh.gateway.batches.owners import find_owner, require_owner
from gpumesh.gateway.batches.pages import read_page, read_page_query
from gpumesh.gateway.batches.upload import PURPOSE, Upload
from gpumesh.gateway.http.errors import BadRequest, TooManyRequests
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse

DEFAULT_LIMIT = MAX_LIMIT = 10_000  # files of one page, as in OpenAI's API
MAX_OWNER_BYTES = 8 << 30  # of the files that one key has stored: a client must not fill the disk
MAX_OWNER_FILES = 10_000
OUTPUT_PURPOSE = "batch_output"  # of the files of results
FILES_AT_A_TIME = 1000  # of one call of the store
_FULL_RETRY_S = 3600.0
_FILE_PATH = re.compile(rf"/v1/files/({ID_PATTERN})(/content)?")


class FileRoutes:
    """The handlers, one for each route. They raise BadRequest for a request that cannot be read, BatchNotFound for a
    file that is missing or belongs to another key, and the other errors of ``BatchStore``."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._arriving: Counter[str] = Counter()  # the bytes of each owner's uploads under way

    async def create(self, request: Request) -> Response:
        """Stores the file of a form."""
        owner = find_owner(request)
        async with closing_iterator(request.read_body_pieces()) as pieces:
            upload = Upload(request, pieces)
            count, size = await self._measure_files(owner)
            if count >= MAX_OWNER_FILES or size + self._arriving[owner] + upload.most_bytes > MAX_OWNER_BYTES:
                raise _full_error(count, size)
            self._arriving[owner] += upload.most_bytes
            try:
                name = await upload.read_name()
                async with closing_iterator(upload.read_file()) as chunks:
                    file = await self._store.create_file(name, chunks, owner=owner, purpose=PURPOSE)
            finally:
                self._arriving[owner] -= upload.most_bytes
        return _reply(describe_file(file))

    async def _measure_files(self, owner: str) -> tuple[int, int]:
        """The number of the files of this owner, and their size in bytes."""
        count = size = 0
        after: str | None = None
        while files := await self._store.list_files(owner=owner, after=after, limit=FILES_AT_A_TIME):
            count += len(files)
            size += sum(file.size for file in files)
            after = files[-1].id
        return count, size

    async def list_files(self, request: Request) -> Response:
        """A page of the files; with ``purpose=batch_output`` of the files of results."""
        owner = find_owner(request)
        query = read_page_query(request, default_limit=DEFAULT_LIMIT, max_limit=MAX_LIMIT)

        async def read_list(after: str | None, limit: int) -> list[StoredFile]:
            if query.purpose == OUTPUT_PURPOSE:
                return await self._list_result_files(owner, after, limit)
            if query.purpose not in (None, PURPOSE):
                return []
            return await self._store.list_files(owner=owner, after=after, limit=limit)

        files, has_more = await read_page(read_list, query)
        return _reply(describe_list([describe_file(file) for file in files], has_more=has_more))

    async def _list_result_files(self, owner: str, after: str | None, limit: int) -> list[StoredFile]:
        """As ``BatchStore.list_files``, for the files of results."""
        last = None if after is None else parse_result_file_id(after)
        if after is not None and last is None:
            return []
        files: list[StoredFile] = []
        after_batch = None
        if last is not None:
            after_batch = last.batch_id
            batch = await self._store.get_batch(after_batch)
            if batch.new.owner == owner and not last.failed:  # the error file comes after the output file
                files = [file for file in result_files(batch) if file.id != after]
        while not files:
            batches = await self._store.list_batches(owner=owner, after=after_batch, limit=limit)
            if not batches:
                return []
            after_batch = batches[-1].id
            files = [file for batch in batches for file in result_files(batch)]
        return files[:limit]

    async def file(self, request: Request) -> Response | StreamingResponse:
        """One file: its document, or its content."""
        file_id, wants_content = _read_path(request)
        result_file = parse_result_file_id(file_id)
        if result_file is not None:
            file = await self._find_result_file(request, file_id, result_file)
            pieces = read_result_file(self._store, result_file.batch_id, failed=result_file.failed)
        else:
            file = await self._find_file(request, file_id)
            pieces = self._store.read_file(file_id)
        return await _send_content(request, pieces) if wants_content else _reply(describe_file(file))

    async def delete(self, request: Request) -> Response:
        """Deletes a file that no batch needs any more."""
        file_id, names_content = _read_path(request)
        if names_content:
            raise BadRequest("method not allowed", status=405)
        result_file = parse_result_file_id(file_id)
        if result_file is not None:
            await self._find_result_file(request, file_id, result_file)
            raise BatchConflict(
                "the results belong to their batch, and are removed with it",
                hint=f"`gpumesh batch rm {result_file.batch_id}` does that now",
            )
        await self._find_file(request, file_id)
        await self._store.delete_file(file_id)
        return _reply({"id": file_id, "object": "file", "deleted": True})

    async def _find_file(self, request: Request, file_id: str) -> StoredFile:
        file = await self._store.get_file(file_id)
        require_owner(request, file.owner, f"file {file_id!r}")
        return file

    async def _find_result_file(self, request: Request, file_id: str, result_file: ResultFileId) -> StoredFile:
        """Raises BatchNotFound also for a batch that has not ended, or has no such results."""
        batch = await self._store.get_batch(result_file.batch_id)
        require_owner(request, batch.new.owner, f"file {file_id!r}")
        for file in result_files(batch):
            if file.id == file_id:
                return file
        raise BatchNotFound(f"there is no file {file_id!r} (yet)")


def _full_error(count: int, size: int) -> TooManyRequests:
    """The error for an upload of an owner who has stored so many files of ``size`` bytes in all."""
    return TooManyRequests(
        f"{count} files of {size >> 20} MiB are stored for this key, which may store {MAX_OWNER_FILES} files of"
        f" {MAX_OWNER_BYTES >> 20} MiB: delete those that are not needed any more",
        retry_after_s=_FULL_RETRY_S,
        may_retry=False,
    )


def _read_path(request: Request) -> tuple[str, bool]:
    """The file's id in the path, and whether the path names its content. Raises BadRequest for another path."""
    match = _FILE_PATH.fullmatch(request.path)
    if match is None:
        raise BadRequest(f"there is no {request.path[:200]} here", status=404)
    return match[1], match[2] is not None


async def _send_content(request: Request, pieces: AsyncIterator[bytes]) -> StreamingResponse:
    """Streams a file to the client. If the store fails after the first bytes, the connection is cut."""
    stream = request.start_stream((("Content-Type", "application/octet-stream"),))
    if request.method != "HEAD":
        async with closing_iterator(pieces) as chunks:
            async for chunk in chunks:
                stream.write(chunk)
                await stream.drain()
                await asyncio.sleep(0)  # a client that reads fast must not hold up the others
    stream.finish()
    return stream


def _reply(document: Document) -> Response:
    return json_response(safe_json.dump_compact(document))
