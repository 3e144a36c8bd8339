"""``/v1/batches``: a client makes a batch of a file, watches it and cancels it."""

from __future__ import annotations

import re

from gpumesh.backends import safe_json
from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch, BatchStatus, NewBatch
from gpumesh.errors import BatchConflict, BatchNotFound
from gpumesh.gateway.batches.documents import (
    ID_PATTERN,
    Document,
    describe_batch,
    describe_list,
    read_metadata,
    read_window,
)
from gpumesh.gateway.batches.endpoints import ENDPOINT_RULE, is_batch_endpoint
from gpumesh.gateway.batches.owners import find_owner, require_owner
from gpumesh.gateway.batches.pages import read_page, read_page_query
from gpumesh.gateway.http.errors import BadRequest, TooManyRequests, body_too_large
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response, json_response

DEFAULT_LIMIT, MAX_LIMIT = 20, 100  # batches of one page, as in OpenAI's API
MAX_OPEN_BATCHES = 200  # of one key: a client must not fill the store
MAX_DOCUMENT_BYTES = 64 << 10  # metadata may have 10 KiB
_OPEN = tuple(status for status in BatchStatus if not status.has_ended)
_OPEN_RETRY_S = 60.0
_BATCH_PATH = re.compile(rf"/v1/batches/({ID_PATTERN})(/cancel)?")


class BatchRoutes:
    """The handlers, one for each route. They raise BadRequest for a request that cannot be read, BatchNotFound for a
    batch that is missing or belongs to another key, and the other errors of ``BatchStore``."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store

    async def create(self, request: Request) -> Response:
        """Makes a batch of an uploaded file. Its lines are checked later."""
        owner = find_owner(request)
        document = await _read_document(request)
        endpoint = _read_text(document, "endpoint")
        if not is_batch_endpoint(endpoint):
            raise BadRequest(f"endpoint {endpoint[:100]!r} is no route of a batch: {ENDPOINT_RULE}")
        file_id = _read_text(document, "input_file_id")
        if re.fullmatch(ID_PATTERN, file_id) is None:
            raise BadRequest("input_file_id is no id of a file")
        window_s = read_window(document.get("completion_window"))
        metadata = read_metadata(document.get("metadata"))
        try:
            file = await self._store.get_file(file_id)
            require_owner(request, file.owner, f"file {file_id[:100]!r}")
        except BatchNotFound:
            raise BadRequest(f"input_file_id: there is no file {file_id[:100]!r}") from None
        open_batches = await self._store.list_batches(owner=owner, statuses=_OPEN, limit=MAX_OPEN_BATCHES)
        if len(open_batches) >= MAX_OPEN_BATCHES:
            raise TooManyRequests(
                f"{MAX_OPEN_BATCHES} batches of this key have not ended yet",
                retry_after_s=_OPEN_RETRY_S,
                may_retry=False,
            )
        new = NewBatch(endpoint, file_id, file.name, window_s, owner, metadata)
        return _reply(await self._store.create_batch(new))

    async def list_batches(self, request: Request) -> Response:
        """A page of the batches, the newest first."""
        owner = find_owner(request)
        query = read_page_query(request, default_limit=DEFAULT_LIMIT, max_limit=MAX_LIMIT)

        async def read_list(after: str | None, limit: int) -> list[Batch]:
            return await self._store.list_batches(owner=owner, after=after, limit=limit)

        batches, has_more = await read_page(read_list, query)
        document = describe_list([describe_batch(batch) for batch in batches], has_more=has_more)
        return json_response(safe_json.dump_compact(document))

    async def batch(self, request: Request) -> Response:
        """One batch."""
        batch_id, names_cancel = _read_path(request)
        if names_cancel:
            raise BadRequest("method not allowed", status=405)
        return _reply(await self._find_batch(request, batch_id))

    async def cancel(self, request: Request) -> Response:
        """Cancels a batch. Its results so far stay."""
        batch_id, names_cancel = _read_path(request)
        if not names_cancel:
            raise BadRequest("method not allowed", status=405)
        batch = await self._find_batch(request, batch_id)
        if batch.status.has_ended and batch.status is not BatchStatus.CANCELLED:
            raise BatchConflict(f"a batch with the status {batch.status} cannot be cancelled")
        return _reply(await self._store.cancel(batch_id))

    async def _find_batch(self, request: Request, batch_id: str) -> Batch:
        batch = await self._store.get_batch(batch_id)
        require_owner(request, batch.new.owner, f"batch {batch_id!r}")
        return batch


async def _read_document(request: Request) -> Document:
    """The body of the request. Raises BadRequest if it is no JSON object, or too large."""
    length = (request.headers.get("content-length") or "").lstrip("0")
    if len(length) > len(str(MAX_DOCUMENT_BYTES)):
        raise body_too_large()
    body = await request.read_body()
    if len(body) > MAX_DOCUMENT_BYTES:
        raise body_too_large()
    document = safe_json.parse_object(body)
    if document is None:
        raise BadRequest("the request body is not a JSON object")
    return document


def _read_text(document: Document, name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} is required")
    return value


def _read_path(request: Request) -> tuple[str, bool]:
    """The batch's id in the path, and whether the path says to cancel it. Raises BadRequest for another path."""
    match = _BATCH_PATH.fullmatch(request.path)
    if match is None:
        raise BadRequest(f"there is no {request.path[:200]} here", status=404)
    return match[1], match[2] is not None


def _reply(batch: Batch) -> Response:
    return json_response(safe_json.dump_compact(describe_batch(batch)))
