"""The hot path: a client's request goes to the mesh, and the answer is pushed into the client's stream as it comes.

Nothing is parsed without need: the request's body and the answer's pieces are passed on as they come. A client that
reads slowly pauses the connection to its node, so that memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.balancer.base import Demand
from gpumesh.balancer.select import has_model
from gpumesh.errors import BackendError, GPUMeshError
from gpumesh.gateway import error_shapes
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.model_requests import ClientApi
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind

# Headers that concern only the client, or only the connection to the client, and not a backend.
_NOT_FORWARDED = frozenset(
    {
        "host",
        "origin",
        "referer",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "content-length",
        "upgrade",
        "te",
        "trailer",
        "expect",
        "proxy-authorization",
        "proxy-connection",
        "authorization",
        "x-api-key",
        "cookie",
        "accept-encoding",
        "content-encoding",  # the body is unpacked when it is read here
        # The next headers ask for a part of an answer, or for no answer if the client has it. The mesh needs whole
        # answers.
        "range",
        "if-range",
        "if-match",
        "if-none-match",
        "if-modified-since",
        "if-unmodified-since",
    }
)


def build_call(request: Request, body: bytes) -> HttpCall:
    """The request to the backend: the client's path and query, ``body``, and the client's headers that concern a
    backend."""
    headers = tuple(
        (name, value)
        for name, value in request.headers.pairs
        if (lower := name.lower()) not in _NOT_FORWARDED
        and not lower.startswith(("x-gpumesh-", "x-forwarded-", "sec-"))
    )
    return HttpCall(request.method, request.target, body, headers)


async def forward_request(
    mesh: Mesh,
    request: Request,
    demand: Demand,
    call: HttpCall,
    shape: ClientApi,
    *,
    timeout_s: float,
    on_answer: Callable[[Answer], None],
    require_json: bool = False,
) -> Response | StreamingResponse:
    """Sends the request to the mesh, and the answer to the client.

    ``on_answer`` is called with the answer when its first bytes have come, for the accounting. ``require_json``: the
    answer must be a JSON object, and any node can give it. If a client could not read the answer, other nodes are
    asked.

    Raises GPUMeshError only before the first byte to the client.
    """
    calls: Mapping[BackendKind, HttpCall] = dict.fromkeys(demand.kinds, call)
    answer = await mesh.send(
        demand,
        calls,
        timeout_s=timeout_s,
        resume=read_resume(request.headers),
        try_reserve_memory=request.try_reserve_memory,
    )
    if require_json and not _is_readable(answer):
        answer = await _ask_other_nodes(mesh, demand, calls, answer, timeout_s)
    on_answer(answer)
    if answer.body is not None:
        return _whole_response(answer, answer.body, shape)
    try:
        return await _stream_response(request, answer, shape)
    finally:
        await answer.aclose()


def _is_readable(answer: Answer) -> bool:
    """Whether the answer is whole and, if it is a success, a JSON object that any client can parse."""
    return answer.body is not None and (answer.status != 200 or safe_json.is_strict_object(answer.body))


async def _ask_other_nodes(
    mesh: Mesh, demand: Demand, calls: Mapping[BackendKind, HttpCall], answer: Answer, timeout_s: float
) -> Answer:
    """Asks the other nodes one by one, and returns the first readable answer. Raises BackendError if there is none."""
    await answer.aclose()
    for candidate in mesh.candidates():
        can_serve = candidate.usable and candidate.kind in demand.kinds and has_model(candidate, demand.model)
        if candidate.name == answer.node or demand.node is not None or not can_serve:
            continue  # ``demand.node``: the client asked for one node
        try:
            other = await mesh.send(replace(demand, node=candidate.name), calls, timeout_s=timeout_s)
        except GPUMeshError:
            continue
        if _is_readable(other):
            other.attempts += answer.attempts
            return other
        await other.aclose()
    raise BackendError("its answer is not the JSON that it should be", node=answer.node)


async def _stream_response(request: Request, answer: Answer, shape: ClientApi) -> StreamingResponse:
    stream = request.start_stream(_response_headers(answer), status=answer.status)
    try:
        await answer.send_to(stream)
    except GPUMeshError as error:
        message = error_shapes.client_message(error)
        frame = answer.error_frame(message)
        stream.write(frame or error_shapes.error_frame(shape, error_shapes.error_status(error), message))
    stream.finish()
    return stream


def _whole_response(answer: Answer, body: bytes, shape: ClientApi) -> Response:
    if answer.error_message is not None:
        body = error_shapes.error_body(shape, answer.status, answer.error_message)
    elif answer.status >= 500 and not error_shapes.is_error_body(shape, safe_json.parse_object(body)):
        return _translate_error(answer, body, shape)
    return Response(body, status=answer.status, headers=_response_headers(answer))


def _translate_error(answer: Answer, body: bytes, shape: ClientApi) -> Response:
    """Writes a server's failure in the client's dialect: the server has another dialect, or sent the failure as an
    event."""
    # The last event of a stream, or the whole body if it is no event.
    message = DIALECTS[answer.kind].error_text(answer.status, body.rpartition(b"data: ")[2])
    headers = tuple(pair for pair in _response_headers(answer) if pair[0].lower() != "content-type")
    return json_response(error_shapes.error_body(shape, answer.status, message), status=answer.status, headers=headers)


def read_resume(headers: Mapping[str, str]) -> bool:
    """Whether another node may continue a cut answer. Raises BadRequest for an unknown value of
    ``X-GPUMesh-Resume``."""
    value = headers.get("x-gpumesh-resume")
    if value is None or value.strip().lower() == "on":
        return True
    if value.strip().lower() == "off":
        return False
    raise BadRequest(f"X-GPUMesh-Resume is on or off, not {value!r}")


def _response_headers(answer: Answer) -> HeaderPairs:
    return (
        *answer.headers,
        ("X-GPUMesh-Node", answer.node),
        ("X-GPUMesh-Attempts", str(answer.attempts)),
        ("X-GPUMesh-Queue-Ms", f"{answer.queue_ms:.1f}"),
    )
