"""Helpers for the routes of the stand-ins: read a request, answer it, refuse it, or reset its connection."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from gpumesh.lab.answers import ApiError
from gpumesh.tunnels.local_system.sockets import reset_on_close


def dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as an object, with any Content-Type. Raises ApiError."""
    data = await request.read()
    if not data:
        raise ApiError(400, "missing request body")
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ApiError(400, f"invalid character in request body: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "json: cannot unmarshal request body into an object")
    return body


async def abort_connection(request: web.Request, response: web.StreamResponse | None) -> web.StreamResponse:
    """Resets the connection. The bytes that were written before it are sent."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        # RST instead of FIN: as when a process with a full buffer is killed.
        reset_on_close(sock)
        request.transport.abort()
    return response or web.Response()


def error_response(path: str, status: int, message: str) -> web.Response:
    """An error in the form that Ollama uses on this path."""
    document: dict[str, Any] = {"error": message}
    if path.startswith("/v1/messages"):
        kind = {404: "not_found_error", 400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "api_error")
        document = {"type": "error", "error": {"type": kind, "message": message}}
    elif path.startswith("/v1/"):
        kind = {404: "not_found_error", 400: "invalid_request_error"}.get(status, "api_error")
        document = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return web.json_response(document, status=status, dumps=dump_json)


def json_response(document: Any, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, dumps=dump_json)
