"""The hot path: a client's request to the mesh, the answer back as it comes.

Nothing is taken apart that need not be: the body goes on as it came, the answer's pieces as they come. Writing waits
when the client is slow, the upstream's buffer is bounded, so that memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

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

# What is the client's or this hop's own affair and says nothing to a backend.
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
        # About what a client has kept of an answer, or a part of one: an answer goes on whole, without such names.
        "range",
        "if-range",
        "if-match",
        "if-none-match",
        "if-modified-since",
        "if-unmodified-since",
    }
)


def build_call(request: Request, body: bytes) -> HttpCall:
    """The client's request as it is sent on: the same path, query and body; headers without what is the hop's own."""
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
    """``on_answer`` is told of the answer when its first bytes are there, for the books. ``require_json``: it is an
    object that any node could give as well; one that a client could not read is asked of another node.

    Raises GPUMeshError only while nothing was sent to the client.
    """
    calls: Mapping[BackendKind, HttpCall] = dict.fromkeys(demand.kinds, call)
    answer = await mesh.send(
        demand,
        calls,
        timeout_s=timeout_s,
        resume=read_resume(request.headers),
        try_reserve_memory=request.try_reserve_memory,
    )
    if require_json and not _readable(answer):
        answer = await _of_another(mesh, demand, calls, answer, timeout_s)
    on_answer(answer)
    try:
        return await _pass_on(request, answer, shape)
    finally:
        await answer.aclose()


def _readable(answer: Answer) -> bool:
    return answer.body is not None and (answer.status != 200 or safe_json.is_strict_object(answer.body))


async def _of_another(
    mesh: Mesh, demand: Demand, calls: Mapping[BackendKind, HttpCall], answer: Answer, timeout_s: float
) -> Answer:
    """The first answer of another node that a client can read. Raises BackendError if there is none."""
    await answer.aclose()
    for candidate in mesh.candidates():
        fits = candidate.usable and candidate.kind in demand.kinds and has_model(candidate, demand.model)
        if candidate.name == answer.node or demand.node is not None or not fits:
            continue
        try:
            other = await mesh.send(replace(demand, node=candidate.name), calls, timeout_s=timeout_s)
        except GPUMeshError:
            continue
        if _readable(other):
            other.attempts += answer.attempts
            return other
        await other.aclose()
    raise BackendError("its answer is not the JSON that it should be", node=answer.node)


async def _pass_on(request: Request, answer: Answer, shape: ClientApi) -> Response | StreamingResponse:
    if answer.body is not None:
        problem = answer.error_message
        if (
            problem is None
            and answer.status >= 500
            and not error_shapes.is_error_body(shape, safe_json.parse_object(answer.body))
        ):
            return _reshaped(answer, answer.body, shape)
        body = answer.body if problem is None else error_shapes.error_body(shape, answer.status, problem)
        return Response(body, status=answer.status, headers=_headers(answer))
    stream = request.start_stream(_headers(answer), status=answer.status)
    try:
        await answer.send_to(stream)
    except GPUMeshError as error:
        words = error_shapes.client_message(error)
        stream.write(
            answer.error_frame(words) or error_shapes.error_frame(shape, error_shapes.error_status(error), words)
        )
    stream.finish()
    return stream


def _reshaped(answer: Answer, body: bytes, shape: ClientApi) -> Response:
    """A server's failure that is not said in the client's dialect: its server knows another, or said it as an event."""
    words = DIALECTS[answer.kind].error_text(answer.status, body.rpartition(b"data: ")[2])
    headers = tuple(pair for pair in _headers(answer) if pair[0].lower() != "content-type")
    return json_response(error_shapes.error_body(shape, answer.status, words), status=answer.status, headers=headers)


def read_resume(headers: Mapping[str, str]) -> bool:
    """Whether a cut answer may be continued by another node."""
    asked = headers.get("X-GPUMesh-Resume")
    if asked is None or asked.strip().lower() == "on":
        return True
    if asked.strip().lower() == "off":
        return False
    raise BadRequest(f"X-GPUMesh-Resume is on or off, not {asked!r}")


def _headers(answer: Answer) -> HeaderPairs:
    return (
        *answer.headers,
        ("X-GPUMesh-Node", answer.node),
        ("X-GPUMesh-Attempts", str(answer.attempts)),
        ("X-GPUMesh-Queue-Ms", f"{answer.queue_ms:.1f}"),
    )
