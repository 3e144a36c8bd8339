"""Errors in the shape that each client's dialect expects. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gpumesh.errors import (
    BackendError,
    DeadlineExceeded,
    GPUMeshError,
    ModelMissing,
    NoNodeError,
    QueueFull,
    UsageError,
)
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.model_requests import ClientApi
from gpumesh.printable import printable

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 503: "overloaded_error", 529: "overloaded_error"}


def error_status(error: GPUMeshError) -> int:
    match error:
        case BadRequest():
            return error.status
        case UsageError():
            return 400
        case ModelMissing():
            return 404
        case QueueFull() | NoNodeError():
            return 503
        case DeadlineExceeded():
            return 504
        case BackendError():
            return 502
    return 500


def retry_after_s(error: GPUMeshError) -> int | None:
    """For the Retry-After header."""
    if isinstance(error, QueueFull):
        return max(round(error.retry_after_s), 1)
    if isinstance(error, NoNodeError) and not isinstance(error, ModelMissing):
        return 2
    return None


def client_message(error: GPUMeshError) -> str:
    """Message and hint on one line; a model that is missing in Ollama's own words first, which clients look for."""
    if isinstance(error, ModelMissing):
        return f"model '{printable(error.model)}' not found: {error.message}" + (
            f"; {error.hint}" if error.hint else ""
        )
    return f"{error.message}; {error.hint}" if error.hint else error.message


def error_body(shape: ClientApi, status: int, message: str) -> bytes:
    """The whole body of an error response."""
    match shape:
        case ClientApi.OLLAMA:
            document: dict[str, object] = {"error": message}
        case ClientApi.OPENAI:
            kind = _kind(_OPENAI_TYPES, status)
            document = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        case ClientApi.ANTHROPIC:
            kind = _kind(_ANTHROPIC_TYPES, status)
            document = {"type": "error", "error": {"type": kind, "message": message}}
    return json.dumps(document).encode()


def is_error_body(shape: ClientApi, document: Mapping[str, Any] | None) -> bool:
    """Whether the body of an error response is as clients of this dialect expect it."""
    error = None if document is None else document.get("error")
    match shape:
        case ClientApi.OLLAMA:
            return isinstance(error, str)
        case ClientApi.OPENAI:
            return isinstance(error, dict) and isinstance(error.get("message"), str)
        case ClientApi.ANTHROPIC:
            return isinstance(error, dict) and document is not None and document.get("type") == "error"


def _kind(types: Mapping[int, str], status: int) -> str:
    return types.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")


def error_frame(shape: ClientApi, status: int, message: str) -> bytes:
    """An error inside a stream that has begun: the client must see that this is no end."""
    told = error_body(shape, status, message)
    match shape:
        case ClientApi.OLLAMA:
            return told + b"\n"
        case ClientApi.OPENAI:
            return b"data: " + told + b"\n\n"
        case ClientApi.ANTHROPIC:
            return b"event: error\ndata: " + told + b"\n\n"
