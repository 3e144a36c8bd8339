"""Heartbeats of the routes with a model, and what becomes of a reply that comes after a heartbeat has begun the stream.

Then the client has the status 200 already. So an error, and an answer in one piece, can only be a frame of the stream,
in the client's dialect.
"""

from __future__ import annotations

from gpumesh.backends import safe_json
from gpumesh.backends.continuation.stream_formats import stream_format_for
from gpumesh.backends.error_text import error_text
from gpumesh.balancer.outcomes import RequestOutcome
from gpumesh.errors import GPUMeshError
from gpumesh.gateway.error_shapes import (
    client_message,
    error_frame,
    error_status,
    frame_of_error_body,
    is_error_body,
)
from gpumesh.gateway.http.heartbeat import LifeSign
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.model_requests import ClientApi
from gpumesh.gateway.observe.record import RequestRecord

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"
_EVENT_SIGN = LifeSign(  # a comment, which every reader of events skips
    b": waiting\n\n", (("Content-Type", EVENT_STREAM), ("X-Accel-Buffering", "no"))
)
# A blank before a line of JSON belongs to that line, and every JSON parser skips it. An empty line would not do: the
# clients of Ollama in Python and Go take each line for JSON, and fail at an empty one.
_LINE_SIGN = LifeSign(b" ", (("Content-Type", NDJSON), ("X-Accel-Buffering", "no")))


def life_sign(api: ClientApi) -> LifeSign:
    """What keeps the streams of this API from being silent."""
    return _LINE_SIGN if api is ClientApi.OLLAMA else _EVENT_SIGN


def fits_begun_stream(stream_type: str, api: ClientApi) -> bool:
    """Whether an answer of this media type can go on in the stream that a heartbeat has begun for this API."""
    return stream_type == (NDJSON if api is ClientApi.OLLAMA else EVENT_STREAM)


def end_with_error(
    request: Request, stream: StreamingResponse, record: RequestRecord, api: ClientApi, error: GPUMeshError
) -> StreamingResponse:
    """Ends the begun stream with this error, and notes how the request has ended. Raises ConnectionError if the client
    is gone."""
    status = error_status(error)
    return _end_with_failure(stream, record, status, _render_frame(request.path, api, status, client_message(error)))


def end_with_response(
    request: Request, stream: StreamingResponse, record: RequestRecord, api: ClientApi, response: Response
) -> StreamingResponse:
    """Ends the begun stream with an answer that came in one piece, and notes how the request has ended. A line of JSON
    is a whole answer of Ollama's API; a client that reads events would not find it. Raises ConnectionError if the
    client is gone."""
    body, status = response.body, response.status
    if status < 400 and api is ClientApi.OLLAMA:
        stream.write(body.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n")  # between values only: one line
        stream.finish()
        return stream
    if status < 400:
        message = f"{record.node}: it answered in one piece, and not with the stream that was asked for"
        return _end_with_failure(stream, record, 502, _render_frame(request.path, api, 502, message))
    document = safe_json.parse_object(body)
    if document is not None and is_error_body(api, document) and not _has_own_errors(request.path):
        # The server's own error, with all that it says.
        frame = frame_of_error_body(api, safe_json.dump_compact(document))
    else:
        frame = _render_frame(request.path, api, status, error_text(status, body))
    return _end_with_failure(stream, record, status, frame)


def _end_with_failure(stream: StreamingResponse, record: RequestRecord, status: int, frame: bytes) -> StreamingResponse:
    """Writes the frame of a failure, which would have had this status, as the end of the stream."""
    record.outcome = RequestOutcome.REFUSED if status < 500 else RequestOutcome.FAILED
    stream.reported_failure = True
    stream.write(frame)
    stream.finish()
    return stream


def _render_frame(path: str, api: ClientApi, status: int, message: str) -> bytes:
    """The frame of an error in the dialect of this route."""
    if _has_own_errors(path):
        return stream_format_for(path).error_frame(message)
    return error_frame(api, status, message)


def _has_own_errors(path: str) -> bool:
    """Whether an error in a stream of this route has another form than in the other streams of its API."""
    return path == "/v1/responses"
