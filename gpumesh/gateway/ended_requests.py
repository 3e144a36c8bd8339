"""What the client of a request gets that the gateway itself has ended: it stops, or a person has cancelled the request.

The request's task was cancelled. It goes on for a moment to send an error in the client's dialect.
"""

from __future__ import annotations

import asyncio

from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.errors import NoNodeError
from gpumesh.gateway.error_shapes import error_frame, error_reply
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.model_requests import find_client_api
from gpumesh.gateway.observe.record import RequestRecord

STOPPED_MESSAGE = "the gateway was stopped"
CLIENT_GONE_STATUS = 499  # nginx records this status when a client left before its answer
_STOPPED_STATUS = 503


def find_reason(request: Request, record: RequestRecord, *, is_stopping: bool) -> str | None:
    """Why the gateway has cancelled this request; ``None`` if it has not, or can no longer tell the client. It can if
    nothing was sent yet (then with a status), or if the stream is still open (then in the stream)."""
    reason = STOPPED_MESSAGE if is_stopping else record.cancel_reason
    if not request.answer_started:
        return reason
    if request.unfinished_stream is None:
        return None
    has_place = is_stopping or record.answer is None or record.answer.consists_of_frames
    return reason if has_place else None  # no error in the midst of a recording


def reply_with_reason(
    request: Request, record: RequestRecord, reason: str, *, is_stopping: bool
) -> Response | StreamingResponse:
    """Tells the client the reason: with an error at the end of its stream, or with a status if no stream has begun. The
    status of a cancelled request is none after which clients try again by themselves."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()  # the task goes on to send the error
    record.outcome = RequestOutcome.FAILED if is_stopping else RequestOutcome.CANCELLED
    stream = request.unfinished_stream
    if stream is None and is_stopping:
        return error_reply(record.path, NoNodeError(reason, hint="try again in a moment"))
    if stream is None:
        return error_reply(record.path, BadRequest(reason, status=CLIENT_GONE_STATUS))
    frame = None if record.answer is None else record.answer.error_frame(reason)
    if frame is None:  # the stream is no generated text, but for example the progress of a pull
        status = _STOPPED_STATUS if is_stopping else CLIENT_GONE_STATUS
        frame = error_frame(find_client_api(record.path), status, reason)
    stream.write(frame)
    stream.finish()
    return stream
