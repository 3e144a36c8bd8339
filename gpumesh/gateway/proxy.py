"""The hot path: sends a client's request to the mesh, and pushes the answer into the client's stream as it comes.

Nothing is parsed without need: the request's body and the answer's pieces are passed on as they come. A client that
reads slowly pauses the connection to its node, so that memory does not grow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from urllib.parse import quote, unquote_plus

from msgspec.structs import replace

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.balancer.base import Demand
from gpumesh.balancer.scheduling.explanation import NO_PLACEMENT, explain_placement
from gpumesh.balancer.select import meets_demand
from gpumesh.errors import BackendError, GPUMeshError
from gpumesh.gateway import error_shapes
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import HeaderPairs, Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.late_replies import fits_begun_stream
from gpumesh.gateway.model_requests import ClientApi
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.requests.answer import Answer, SendProgress
from gpumesh.mesh.requests.answer_reading import STREAMING_TYPES
from gpumesh.text.model_names import full_name

# Headers that concern only the client, or only the connection to the client, and not a backend. In lower case. Hop and
# credential headers have many names, so most of them are recognised by a part of the name (``_concerns_client``).
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
        "forwarded",
        "via",
        "max-forwards",
        "cdn-loop",
        "remote-user",
        "early-data",
        "dnt",
        "from",
        "http2-settings",
        "alt-used",
        "x-forwarded",
        "x-scheme",
        "x-url-scheme",
        "x-host",
        # A proxy before the server could take one of these for the method or the path.
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "dpop",
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
_SAFE_IN_HEADER = "/:@+ ,()[]"  # characters of a model's name that stand in a header as they are, beside letters
# Proxies and networks before the gateway add headers with these beginnings: Cloudflare, CloudFront, Fastly, Akamai,
# AWS, Azure, Google, Fly, Vercel, Envoy and Tailscale.
_NOT_FORWARDED_PREFIXES = (
    "x-gpumesh-",
    "x-forwarded-",
    "ocp-apim-",
    "sec-",
    "cf-",
    "cloudfront-",
    "fastly-",
    "akamai-",
    "x-amz",
    "x-ms-",
    "x-azure-",
    "x-goog-",
    "x-appengine-",
    "x-cloud-trace-",
    "fly-",
    "x-vercel-",
    "x-envoy-",
    "x-original-",
    "x-real-",
    "x-proxy",
    "x-remote-",
    "x-rewrite-",
    "x-originating-",
    "x-arr-",
    "x-ray-",
    "ssl-",
    "x-ssl-",
    "tailscale-",
)
# A name with one of these parts holds a credential, or tells where the client is.
_CLIENT_PARTS = re.compile(
    r"auth|cookie|passw(?:or)?d|secret|credential|assertion|jwt|apikey|bearer|signature|(?<!idempotency-)\bkey$|\btoken$"
    r"|\b(?:pass|pwd|sid|sessid|sessionid)$"
    r"|(?:client|source|remote|connecting)-?(?:ip|addr|address|cert|dn|verify)"
)

_PLAIN_CONNECTIONS = frozenset({"keep-alive", "close"})
_QUERY_CREDENTIAL = re.compile(
    r"^key$|apikey|(?:api|access|subscription)-key$|\btoken$|passw(?:or)?d|secret|signature|\bsig$|jwt|bearer|^auth"
)


def build_call(request: Request, body: bytes) -> HttpCall:
    """The request to the backend: the client's path and query, ``body``, and the client's headers that concern a
    backend."""
    headers = [pair for pair in request.headers.pairs if not _concerns_client(pair[0])]
    connection = request.headers.get("connection")
    if connection is not None and connection.lower() not in _PLAIN_CONNECTIONS:  # it names other headers of the hop
        names = {name.strip() for name in connection.lower().split(",")}
        headers = [pair for pair in headers if pair[0].lower() not in names]
    target = request.target if "?" not in request.target else remove_credentials(request.target)
    return HttpCall(request.method, target, body, tuple(headers))


def remove_credentials(target: str) -> str:
    """A path and a query without the parts of the query that hold a credential of the client (``api_key=…``)."""
    path, _, query = target.partition("?")
    pairs = query.split("&")
    names = (unquote_plus(pair.partition("=")[0]).lower().replace("_", "-") for pair in pairs)
    kept = [pair for pair, name in zip(pairs, names, strict=True) if _QUERY_CREDENTIAL.search(name) is None]
    if len(kept) == len(pairs):
        return target
    return f"{path}?{'&'.join(kept)}" if kept else path


@lru_cache(maxsize=1024)  # a client sends the same names with each request
def _concerns_client(name: str) -> bool:
    """Whether a header of this name concerns the client or its connection alone: it ends at the gateway."""
    lower_name = name.lower()
    if lower_name in _NOT_FORWARDED or lower_name.startswith(_NOT_FORWARDED_PREFIXES):
        return True
    return _CLIENT_PARTS.search(lower_name) is not None


async def forward_request(
    mesh: Mesh,
    request: Request,
    demand: Demand,
    call: HttpCall,
    shape: ClientApi,
    *,
    timeout_s: float,
    progress: SendProgress,
    on_answer: Callable[[Answer], None],
    require_json: bool = False,
) -> Response | StreamingResponse:
    """Sends the request to the mesh. Returns the whole answer as a response, or the stream when the answer has ended.

    ``shape``: the API of the client, for the form of errors. For the accounting, ``progress`` is kept up to date, and
    ``on_answer`` is called with the answer when its first bytes have come. ``require_json``: the answer must be a JSON
    object, and any node can give it. If a client could not read the first node's answer, the other nodes are asked.

    Raises GPUMeshError only before the first byte of an answer. A heartbeat may have begun the client's stream.
    """
    headers = request.headers
    wants_why = "x-gpumesh-explain" in headers and read_explain(headers)
    answer = await mesh.send(
        demand,
        call,
        timeout_s=timeout_s,
        resume="x-gpumesh-resume" not in headers or read_resume(headers),
        try_reserve_memory=request.try_reserve_memory,
        progress=progress,
    )
    if require_json and not _is_readable(answer):
        answer = await _ask_other_nodes(mesh, demand, call, answer, timeout_s, progress)
    on_answer(answer)
    if wants_why:
        answer.why = _explain_answer(mesh, answer)
    if answer.body is not None:
        return _whole_response(answer, answer.body, shape)
    try:
        return await _stream_response(request, answer, shape)
    finally:
        await answer.aclose()


def _is_readable(answer: Answer) -> bool:
    """Whether every client can read the answer: it came in one piece, and is a JSON object that any parser takes. An
    error, which has another status than 200, need not be JSON."""
    return answer.body is not None and (answer.status != 200 or safe_json.is_strict_object(answer.body))


async def _ask_other_nodes(
    mesh: Mesh,
    demand: Demand,
    call: HttpCall,
    answer: Answer,
    timeout_s: float,
    progress: SendProgress,
) -> Answer:
    """Asks the other nodes one by one, and returns the first readable answer. Raises BackendError if there is none."""
    await answer.aclose()
    for node in _find_other_nodes(mesh, demand, answer.node):
        try:
            other_answer = await mesh.send(replace(demand, node=node), call, timeout_s=timeout_s, progress=progress)
        except GPUMeshError:  # this node gives no answer, but the next may
            continue
        if _is_readable(other_answer):
            return other_answer
        await other_answer.aclose()
    raise BackendError("its answer is not the JSON that it should be", node=answer.node)


def _find_other_nodes(mesh: Mesh, demand: Demand, asked_node: str) -> list[str]:
    """The names of all nodes that can serve the demand, except ``asked_node``; none if the client asked for one
    node."""
    if demand.node is not None:
        return []
    usable = [candidate for candidate in mesh.candidates() if candidate.usable and candidate.name != asked_node]
    return [candidate.name for candidate in usable if meets_demand(candidate, demand)]


async def _stream_response(request: Request, answer: Answer, shape: ClientApi) -> StreamingResponse:
    """Streams the answer to the client, and returns the stream at its end. An error in the midst of the stream becomes
    its last frame. An answer without frames (JSON, audio) has no place for an error: its stream is returned unfinished,
    and the server cuts the connection. Raises BackendError if the answer cannot go on in the stream that a heartbeat
    has begun."""
    heartbeat, stream = request.heartbeat, request.stream
    if heartbeat is not None and not answer.consists_of_frames:  # a sign could come in the midst of a frame
        heartbeat.stop()
    if stream is None:
        # nginx would hold a stream back until it has some KiB of it.
        headers = (*_response_headers(answer), ("X-Accel-Buffering", "no"))
        stream = request.start_stream(headers, status=answer.status)
    elif not fits_begun_stream(_media_type(answer), shape):
        raise BackendError("its answer is not the stream that was asked for", node=answer.node)
    try:
        await answer.send_to(stream)
    except GPUMeshError as error:
        if not _has_frames(answer):
            return stream
        message = error_shapes.client_message(error)
        frame = answer.error_frame(message)
        if frame is None:  # the mesh does not know the format of this stream
            frame = error_shapes.error_frame(shape, error_shapes.error_status(error), message)
        stream.write(frame)
    stream.finish()
    return stream


def _has_frames(answer: Answer) -> bool:
    """Whether the answer is a stream of frames, one of which can be an error."""
    return _media_type(answer) in STREAMING_TYPES


def _media_type(answer: Answer) -> str:
    """The answer's media type without parameters; empty if it has none."""
    content_type = next((value for name, value in answer.headers if name == "Content-Type"), "")
    return content_type.partition(";")[0]


def _whole_response(answer: Answer, body: bytes, shape: ClientApi) -> Response:
    """The response for an answer that came in one piece. An error of the mesh, or a failure of the server (status 500
    or above), gets the shape of the client's API. A refusal (4xx) is the server's own answer, and is not changed."""
    if answer.error_message is not None:  # an error of the mesh
        body = error_shapes.error_body(shape, answer.status, answer.error_message)
    elif answer.status >= 500 and not error_shapes.is_error_body(shape, safe_json.parse_object(body)):
        return _translate_error(answer, body, shape)
    return Response(body, status=answer.status, headers=_response_headers(answer))


def _translate_error(answer: Answer, body: bytes, shape: ClientApi) -> Response:
    """Writes a server's failure in the client's dialect, because the server has another dialect, or has sent the
    failure as an event of a stream."""
    _, _, last_event = body.rpartition(b"data: ")  # the whole body, if the body holds no event
    message = DIALECTS[answer.kind].error_text(answer.status, last_event)
    # The type of the server's body does not fit: the new body is JSON.
    headers = tuple((name, value) for name, value in _response_headers(answer) if name.lower() != "content-type")
    return json_response(error_shapes.error_body(shape, answer.status, message), status=answer.status, headers=headers)


def read_resume(headers: Mapping[str, str]) -> bool:
    """Whether another node may continue a cut answer: yes, unless ``X-GPUMesh-Resume`` is ``off``. Raises BadRequest
    for an unknown value."""
    value = headers.get("x-gpumesh-resume")
    if value is None:
        return True
    match value.strip().lower():
        case "on":
            return True
        case "off":
            return False
    raise BadRequest(f"X-GPUMesh-Resume is on or off, not {value!r}")


def read_explain(headers: Mapping[str, str]) -> bool:
    """Whether the client asks why this node was chosen (``X-GPUMesh-Explain: 1``). Raises BadRequest for an unknown
    value."""
    value = headers.get("x-gpumesh-explain")
    if value is None:
        return False
    match value.strip().lower():
        case "1" | "on" | "true" | "yes":
            return True
        case "0" | "off" | "false" | "no":
            return False
    raise BadRequest(f"X-GPUMesh-Explain is 1 or 0, not {value!r}")


def _explain_answer(mesh: Mesh, answer: Answer) -> str:
    """Why this node was chosen, in one line."""
    if answer.placement is None:
        return NO_PLACEMENT
    topology = mesh.topology
    return explain_placement(
        answer.placement,
        policy=topology.gateway.policy,
        queue_s=answer.queue_ms / 1000.0,
        failed_attempts=answer.attempts - 1,
        tiers={node.name: node.tier for node in topology.nodes},
        pinned={full_name(model.name) for model in topology.models if model.pinned},
    )


def _response_headers(answer: Answer) -> HeaderPairs:
    """The headers of the node's answer, and the gateway's own: the node, the attempts and the wait in the queue; the
    model, if the client used another name; why this node was chosen, if the client has asked."""
    model = () if answer.model is None else (("X-GPUMesh-Model", quote(answer.model, safe=_SAFE_IN_HEADER)),)
    why = () if answer.why is None else (("X-GPUMesh-Why", answer.why),)
    return (
        *answer.headers,
        *model,
        *why,
        ("X-GPUMesh-Node", answer.node),
        ("X-GPUMesh-Attempts", str(answer.attempts)),
        ("X-GPUMesh-Queue-Ms", f"{answer.queue_ms:.1f}"),
    )
