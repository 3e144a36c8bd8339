"""Renders errors in the shape that each client API expects: as a body, a frame of a stream, or a whole reply. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from gpumesh.errors import (
    BackendError,
    BatchConflict,
    BatchNotFound,
    BatchStoreError,
    DeadlineExceeded,
    GPUMeshError,
    ModelMissing,
    NoNodeError,
    QueueFull,
    ServersFailed,
    UsageError,
)
from gpumesh.gateway.http.errors import BadRequest, TooManyRequests
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.model_requests import ClientApi, find_client_api
from gpumesh.text.printable import printable

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 503: "overloaded_error", 529: "overloaded_error"}
# What Retry-After says at least and at most while no node can serve. A node may be back sooner than it is tried next.
NO_NODE_RETRY_S = 2
MAX_NO_NODE_RETRY_S = 60
# A request with such a reply is answered before its whole body has come. The rest of the body would be taken for the
# next request, so the connection is closed.
_CLOSING_STATUSES = (408, 413, 417)


def error_status(error: GPUMeshError) -> int:
    """The HTTP status of the reply to a request that ends with this error."""
    match error:
        case BadRequest():
            return error.status
        case UsageError():
            return 400
        case ModelMissing() | BatchNotFound():
            return 404
        case BatchConflict():
            return 409
        case QueueFull() | NoNodeError() | BatchStoreError():
            return 503
        case DeadlineExceeded():
            return 504
        case BackendError():
            return 502
    return 500


def retry_after_s(error: GPUMeshError) -> int | None:
    """Whole seconds for the Retry-After header; ``None`` if it is of no use to try again."""
    if isinstance(error, QueueFull):
        return max(round(error.retry_after_s), 1)
    if isinstance(error, TooManyRequests):
        return max(math.ceil(error.retry_after_s), 1)
    # Both are a NoNodeError, too. But waiting does not bring the model, and a request that servers fail at must not be
    # sent again.
    if isinstance(error, (ModelMissing, ServersFailed)):
        return None
    if isinstance(error, NoNodeError):
        return min(max(math.ceil(error.retry_after_s or 0.0), NO_NODE_RETRY_S), MAX_NO_NODE_RETRY_S)
    return None


def client_message(error: GPUMeshError) -> str:
    """The error's message and hint on one line. For a missing model, Ollama's own message stands first, because clients
    look for it, then a short hint: a program does not read the names of all models, and a key may not allow them."""
    if isinstance(error, ModelMissing):
        message, hint = f"model '{printable(error.model)}' not found", error.short_hint
    else:
        message, hint = error.message, error.hint
    return f"{message}; {hint}" if hint else message


# -- bodies and frames -----------------------------------------------------------------------------------------------


def error_body(api: ClientApi, status: int, message: str) -> bytes:
    """The whole body of an error response in the shape of the client's API."""
    match api:
        case ClientApi.OLLAMA:
            document: dict[str, object] = {"error": message}
        case ClientApi.OPENAI:
            error_type = _error_type(_OPENAI_TYPES, status)
            document = {"error": {"message": message, "type": error_type, "param": None, "code": None}}
        case ClientApi.ANTHROPIC:
            error_type = _error_type(_ANTHROPIC_TYPES, status)
            document = {"type": "error", "error": {"type": error_type, "message": message}}
    return json.dumps(document).encode()


def is_error_body(api: ClientApi, document: Mapping[str, Any] | None) -> bool:
    """Whether the body of an error response has the shape that clients of this API expect. ``document``: the body as a
    JSON object; ``None`` if it is none."""
    error = None if document is None else document.get("error")
    match api:
        case ClientApi.OLLAMA:
            return isinstance(error, str)
        case ClientApi.OPENAI:
            return isinstance(error, dict) and isinstance(error.get("message"), str)
        case ClientApi.ANTHROPIC:
            return isinstance(error, dict) and document is not None and document.get("type") == "error"


def _error_type(types: Mapping[int, str], status: int) -> str:
    """The name of the error for this status. ``types``: the names for some statuses, by status."""
    return types.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")


def error_frame(api: ClientApi, status: int, message: str) -> bytes:
    """An error as a frame of a stream that has begun: from it the client learns that the answer is not complete.

    ``status`` chooses the type of the error in the frame. Only for streams of routes that generate no text, such as
    the progress of a pull. For generated text there is ``StreamFormat.error_frame`` (backends/continuation): it needs
    no status, and it also has the form of ``/v1/responses``.
    """
    return frame_of_error_body(api, error_body(api, status, message))


def frame_of_error_body(api: ClientApi, body: bytes) -> bytes:
    """The body of an error response as a frame of a stream. ``body`` is JSON in one line."""
    match api:
        case ClientApi.OLLAMA:
            return body + b"\n"
        case ClientApi.OPENAI:
            return b"data: " + body + b"\n\n"
        case ClientApi.ANTHROPIC:
            return b"event: error\ndata: " + body + b"\n\n"


# -- replies ---------------------------------------------------------------------------------------------------------


def error_reply(path: str, error: GPUMeshError, *, headers: HeaderPairs = ()) -> Response:
    """The whole error reply to a request for this path."""
    status = error_status(error)
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers = (*headers, ("Retry-After", str(wait_s)))
    # Which error of ours it is: several have the same status, and a server's own error has no such header.
    headers = (*headers, ("X-GPUMesh-Error", error.code))
    # Without this header, the clients of OpenAI and Anthropic repeat a request with status 409, 429 or 503.
    if isinstance(error, (ServersFailed, BatchConflict)) or (
        isinstance(error, TooManyRequests) and not error.may_retry
    ):
        headers = (*headers, ("X-Should-Retry", "false"))
    body = error_body(find_client_api(path), status, client_message(error))
    return json_response(body, status=status, headers=headers, close=status in _CLOSING_STATUSES)


def error_reply_without_path(status: int, message: str) -> Response:
    """The error reply to input that is no request. The client's API is not known, so the reply has Ollama's shape."""
    return json_response(error_body(ClientApi.OLLAMA, status, message), status=status)
