"""One answer: the handler's call, with what must hold of what it returns, and how a whole answer is written."""

from __future__ import annotations

import asyncio
import logging

from gpumesh.gateway.http.client_writer import ClientWriter
from gpumesh.gateway.http.request import Handler, Request
from gpumesh.gateway.http.responses import ErrorRenderer, HeaderPairs, Response, has_no_body, render_head
from gpumesh.gateway.http.streaming_response import StreamingResponse

log = logging.getLogger(__name__)

JOINED_BYTES = 32 << 10  # a body below this is sent in one piece with its head


async def call_handler(handler: Handler, request: Request, render_error: ErrorRenderer) -> Response | StreamingResponse:
    """A whole answer, or a stream that is finished. What is held of the request's body is free afterwards. Raises
    ConnectionError where the connection must be cut, because only a part of an answer was sent."""
    try:
        answer = await handler(request)
    except (ConnectionError, asyncio.CancelledError) as error:
        # Its frames refer to the request, whose body would wait for the garbage collector: some of the frames know the
        # connection's task, which refers to the error.
        error.__traceback__ = None
        raise
    except Exception as error:  # a bug: it must cost one client an error and not all of them the server
        log.error("a request failed", exc_info=error, extra={"event": "request-failed"})  # noqa: TRY400
        answer = render_error(500, "the gateway failed inside")
        answer.close = True
    finally:
        request.end()
    if isinstance(answer, Response):
        if request.answer_started:
            raise ConnectionError("a part of another answer has been sent already")
        if answer.close:
            request.keep_alive = False
    elif not answer.finished:
        raise ConnectionError("the answer was not ended")
    return answer


def write_answer(writer: ClientWriter, response: Response, request: Request, *, keep_alive: bool) -> None:
    """The whole answer to a request."""
    head = render_head(
        response.status,
        request.answer_headers(response.headers),
        length=len(response.body),
        keep_alive=keep_alive,
        is_http10=request.is_http10,
        content_security_policy=response.content_security_policy,
    )
    _write(writer, head, b"" if has_no_body(request.method, response.status) else response.body)


def write_response(writer: ClientWriter, response: Response, headers: HeaderPairs = ()) -> None:
    """An answer to what is no request. The connection does not stay after it."""
    pairs = (*response.headers, *headers)
    head = render_head(response.status, pairs, length=len(response.body), keep_alive=False, is_http10=False)
    _write(writer, head, response.body)


def _write(writer: ClientWriter, head: bytes, body: bytes) -> None:
    if len(body) < JOINED_BYTES:
        writer.write(head + body)
    else:  # not copied
        writer.write(head)
        writer.write(body)
