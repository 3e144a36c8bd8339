"""Helpers for routes of the simulated servers: read a JSON body, answer with JSON or an error, reset a connection."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from gpumesh.lab.answers import ApiError
from gpumesh.tunnels.local_system.sockets import reset_on_close


def dump_json(value: Any) -> str:
    """The value as JSON without blanks and without escapes of non-ASCII characters, as Go writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def read_json(request: web.Request) -> dict[str, Any]:
    """Reads the body as a JSON object, whatever its Content-Type. Raises ApiError for any other body."""
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
    """Resets the client's connection. Bytes that were written before are sent.

    The returned response means nothing to the client: aiohttp wants a response from each handler.
    """
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        # RST instead of FIN, as when a process is killed whose buffer holds unread bytes.
        reset_on_close(sock)
        request.transport.abort()
    return response or web.Response()


def error_response(path: str, status: int, message: str) -> web.Response:
    """Builds an error in the form that Ollama uses on this path: Anthropic's, OpenAI's or Ollama's own."""
    document: dict[str, Any] = {"error": message}
    if path.startswith("/v1/messages"):
        error_types = {404: "not_found_error", 400: "invalid_request_error", 429: "rate_limit_error"}
        document = {"type": "error", "error": {"type": error_types.get(status, "api_error"), "message": message}}
    elif path.startswith("/v1/"):
        error_types = {404: "not_found_error", 400: "invalid_request_error"}
        error = {"message": message, "type": error_types.get(status, "api_error"), "param": None, "code": None}
        document = {"error": error}
    return json_response(document, status)


def json_response(document: Any, status: int = 200) -> web.Response:
    return web.json_response(document, status=status, dumps=dump_json)
