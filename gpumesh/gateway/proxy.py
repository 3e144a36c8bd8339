"""The hot path: a client's request to the mesh, the answer back as it comes.

Nothing is taken apart that need not be: the body goes on as it came, the answer's pieces as they come. aiohttp's
``write`` waits when the client is slow, the upstream's buffer is bounded, so that memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web

from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand
from gpumesh.errors import GPUMeshError
from gpumesh.gateway import errors
from gpumesh.gateway.requests import BadRequest, Shape
from gpumesh.mesh.answer import Answer
from gpumesh.mesh.mesh import Mesh
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
    }
)


def call_of(request: web.BaseRequest, body: bytes) -> HttpCall:
    """The client's request as it is sent on: the same path, query and body; headers without what is the hop's own."""
    headers = tuple(
        (name, value)
        for name, value in request.headers.items()
        if (lower := name.lower()) not in _NOT_FORWARDED
        and not lower.startswith(("x-gpumesh-", "x-forwarded-", "sec-"))
    )
    return HttpCall(request.method, request.raw_path, body, headers)


async def forward(
    mesh: Mesh,
    request: web.BaseRequest,
    demand: Demand,
    call: HttpCall,
    shape: Shape,
    *,
    timeout_s: float,
    answered: Callable[[Answer], None],
) -> web.StreamResponse:
    """``answered`` is told of the answer when its first bytes are there, for the books.

    Raises GPUMeshError only while nothing was sent to the client.
    """
    calls: Mapping[BackendKind, HttpCall] = dict.fromkeys(demand.kinds, call)
    answer = await mesh.send(demand, calls, timeout_s=timeout_s, resume=read_resume(request.headers))
    answered(answer)
    try:
        return await _pass_on(request, answer, shape)
    finally:
        await answer.aclose()


async def _pass_on(request: web.BaseRequest, answer: Answer, shape: Shape) -> web.StreamResponse:
    if answer.body is not None:
        whole = web.Response(body=answer.body, status=answer.status)
        _head(whole, answer)
        return whole
    response = web.StreamResponse(status=answer.status)
    _head(response, answer)
    await response.prepare(request)
    try:
        async for data in answer:
            await response.write(data)
    except GPUMeshError as error:
        words = errors.words_of(error)
        await response.write(answer.error_frame(words) or errors.frame(shape, errors.status_of(error), words))
    await response.write_eof()
    return response


def read_resume(headers: Mapping[str, str]) -> bool:
    """Whether a cut answer may be continued by another node."""
    asked = headers.get("X-GPUMesh-Resume")
    if asked is None or asked.strip().lower() == "on":
        return True
    if asked.strip().lower() == "off":
        return False
    raise BadRequest(f"X-GPUMesh-Resume is on or off, not {asked!r}")


def _head(response: web.StreamResponse, answer: Answer) -> None:
    for name, value in answer.headers:
        response.headers.add(name, value)
    response.headers["X-GPUMesh-Node"] = answer.node
    response.headers["X-GPUMesh-Attempts"] = str(answer.attempts)
    response.headers["X-GPUMesh-Queue-Ms"] = f"{answer.queue_ms:.1f}"
