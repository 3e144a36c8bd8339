"""Answers one request: calls the handler, checks its answer, and writes the answer to the client."""

from __future__ import annotations

import logging

from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import ErrorRenderer, HeaderPairs, Response, has_no_body, render_head
from gpumesh.gateway.http.streaming_response import StreamingResponse

log = logging.getLogger(__name__)

JOINED_BYTES = 32 << 10  # a smaller body is sent in one piece with its head: to copy it costs less than a second write


def render_failure(error: Exception, render_error: ErrorRenderer) -> Response:
    """The answer to a request whose handler has raised this error, a bug of ours: this client gets an error, and the
    server goes on for the others."""
    log.error("a request failed", exc_info=error, extra={"event": "request-failed"})
    answer = render_error(500, "the gateway failed inside")
    answer.close = True
    return answer


def require_complete(request: Request, answer: Response | StreamingResponse) -> None:
    """Raises ConnectionError if the connection must be cut, because only a part of an answer was sent."""
    if isinstance(answer, Response):
        if request.answer_started:
            raise ConnectionError("a part of another answer has been sent already")
        if answer.close:
            request.keep_alive = False
    elif not answer.finished:
        raise ConnectionError("the answer was not ended")


def write_answer(writer: ClientWriter, response: Response, request: Request, *, keep_alive: bool) -> None:
    """Writes the whole answer to a request."""
    body, headers = response.body, response.headers
    if request.id is not None or request.cors is not None:
        headers = request.answer_headers(headers)
    head = render_head(
        response.status,
        headers,
        length=len(body),
        keep_alive=keep_alive,
        is_http10=request.is_http10,
        content_security_policy=response.content_security_policy,
    )
    _write(writer, head, b"" if has_no_body(request.method, response.status) else body)


def write_refusal(writer: ClientWriter, response: Response, headers: HeaderPairs = ()) -> None:
    """Writes an answer that belongs to no request, with ``headers`` added. Its head tells the client that the
    connection ends."""
    pairs = (*response.headers, *headers)
    head = render_head(response.status, pairs, length=len(response.body), keep_alive=False, is_http10=False)
    _write(writer, head, response.body)


def _write(writer: ClientWriter, head: bytes, body: bytes) -> None:
    """Writes head and body, in one piece if the body is small."""
    if len(body) < JOINED_BYTES:
        writer.write(head + body)
    else:  # in two pieces, so that the body is not copied
        writer.write(head)
        writer.write(body)
