"""One attempt on one node, up to the answer's first bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.stream_formats import generates_text
from gpumesh.backends.dialects import find_counters, host_header
from gpumesh.backends.error_text import error_text, is_web_page
from gpumesh.balancer.outcomes import Outcome, classify_status, rule_for_outcome
from gpumesh.errors import BackendStatus, BackendUnreachable, DeadlineExceeded, GPUMeshError, StreamCut
from gpumesh.mesh.nodes.ledger import Lease
from gpumesh.mesh.requests.answer import WholeAnswer, error_answer
from gpumesh.mesh.requests.upstream import Upstream, UpstreamResponse
from gpumesh.slice_queue import FRAME_SLICE_BYTES

STREAMING = frozenset({"application/x-ndjson", "text/event-stream"})
# A whole answer is held back until it is complete, so that one cut short can be asked of another node.
HELD_BYTES = 32 << 20
ERROR_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that another node may make good. ``answer`` is the server's own error, if it gave one.

    ``request_sent``: the server had the request when it failed. ``lease`` is the one it had, released by now;
    ``duration_s`` from sending to the end.
    """

    node: str
    outcome: Outcome
    error: GPUMeshError
    answer: WholeAnswer | None = None
    request_sent: bool = False
    lease: Lease | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """A stream that has begun; its lease is held. ``first_bytes`` is for the client, ``unread_bytes`` what was read
    after it. ``continuation`` is ``None`` for what is no generated text (the progress of a pull …)."""

    lease: Lease
    response: UpstreamResponse
    continuation: Continuation | None
    first_bytes: bytes
    unread_bytes: bytes = b""


async def run_attempt(
    upstream: Upstream,
    lease: Lease,
    call: HttpCall,
    *,
    timeout_s: float,
    continuation: Callable[[], Continuation] | None = None,
    at_most_once: bool = False,
) -> WholeAnswer | OpenedStream | FailedAttempt:
    """One try on the leased node. ``continuation`` gives what reads a generated stream; without it all is passed on.
    ``at_most_once``: nothing may make the server do it twice.

    The lease is released here unless the stream took it over; also when this is cancelled.
    """

    async def first_bytes(response: UpstreamResponse) -> WholeAnswer | OpenedStream | FailedAttempt:
        outcome = classify_status(response.status, model_asked=lease.model is not None)
        if response.problem is not None:
            return await _not_inference(lease, response, outcome, response.problem)
        if outcome is not Outcome.SERVED:
            return await _refused(lease, response, outcome)
        if response.content_type not in STREAMING and (response.content_length or 0) <= HELD_BYTES:
            return await _held(lease, response, call)
        if continuation is not None and generates_text(call.path):
            return await _generated(lease, response, continuation())
        return OpenedStream(lease, response, None, await response.read())

    return await _guarded(upstream, lease, call, first_bytes, timeout_s=timeout_s, once=at_most_once)


async def ask_node(
    upstream: Upstream, lease: Lease, call: HttpCall, *, timeout_s: float
) -> tuple[int, bytes] | FailedAttempt:
    """A short question on the side: status and body. The lease stays held, unless the node failed it.

    A node that only takes too long has not failed: it gives no answer, status 0.
    """

    async def whole(response: UpstreamResponse) -> tuple[int, bytes] | FailedAttempt:
        outcome = classify_status(response.status, model_asked=lease.model is not None)
        if rule_for_outcome(outcome).fail_over:
            return _failed(lease, outcome, _status_error(lease, response, b""))
        if response.problem is not None:
            response.abort()
            return 502, b""
        return response.status, await _whole(response, ERROR_BYTES) or b""

    return await _guarded(upstream, lease, call, whole, timeout_s=timeout_s, late=(0, b""))


async def _guarded(
    upstream: Upstream,
    lease: Lease,
    call: HttpCall,
    then: Callable[[UpstreamResponse], Awaitable[T | FailedAttempt]],
    *,
    timeout_s: float,
    late: T | None = None,
    once: bool = False,
) -> T | FailedAttempt:
    """Sends and does ``then`` with the answer. Whatever goes wrong, the connection is closed, so that the server stops
    too, and the lease is released; except for the time-out, if there is a result for it."""
    node = lease.node
    loop = asyncio.get_running_loop()
    response: UpstreamResponse | None = None
    began = loop.time()
    if lease.aborted:  # while it was held for something else
        return _lost(lease)
    try:
        async with asyncio.timeout(timeout_s) as scope:
            lease.set_abort_callback(lambda: scope.reschedule(loop.time()))
            headers, name = _headers(lease, call), _server_name(lease)
            response = await upstream.request(
                node.base_url, call, headers, node=node.name, server_name=name, at_most_once=once
            )
            result = await then(response)
            lease.set_abort_callback(response.abort)
            return replace(result, duration_s=loop.time() - began) if isinstance(result, FailedAttempt) else result
    except TimeoutError:
        if response is not None:
            response.abort()
        if lease.aborted:
            return replace(_lost(lease), request_sent=True)
        if late is not None:
            return late
        return _failed(lease, Outcome.DEADLINE, DeadlineExceeded(f"no answer within {timeout_s:.0f} s", node=node.name))
    except BackendUnreachable as error:
        took_s = loop.time() - began
        return replace(_failed(lease, Outcome.UNREACHABLE, error), request_sent=error.request_sent, duration_s=took_s)
    except StreamCut as error:
        return replace(_failed(lease, Outcome.CUT, error), request_sent=True, duration_s=loop.time() - began)
    except BaseException:
        if response is not None:
            response.abort()
        lease.release(Outcome.CLIENT_GONE)
        raise


def _failed(lease: Lease, outcome: Outcome, error: GPUMeshError, answer: WholeAnswer | None = None) -> FailedAttempt:
    lease.release(outcome, error=str(error))
    # Its frames hold the request, which holds it: the body would have to wait for the garbage collector.
    error.__traceback__ = None
    return FailedAttempt(lease.node.name, outcome, error, answer, request_sent=answer is not None, lease=lease)


def _lost(lease: Lease) -> FailedAttempt:
    error = BackendUnreachable("the way to it was lost", node=lease.node.name)
    return _failed(lease, Outcome.UNREACHABLE, error)


async def _refused(lease: Lease, response: UpstreamResponse, outcome: Outcome) -> WholeAnswer | FailedAttempt:
    """A status that is an error: the node's, or the client's own."""
    node = lease.node
    body = await _whole(response, ERROR_BYTES) or b""
    answer = WholeAnswer(node.name, node.kind, response.status, response.headers, body)
    if rule_for_outcome(outcome).fail_over:
        return _failed(lease, outcome, _status_error(lease, response, body), answer)
    lease.release(outcome)
    return answer


async def _not_inference(
    lease: Lease, response: UpstreamResponse, outcome: Outcome, problem: str
) -> WholeAnswer | FailedAttempt:
    """The answer of something else than an inference server: the page of a proxy, of a login, of a hostile host.
    Nothing of its body is for a client. An error's status stands; a success is none, and becomes a 502."""
    node, status = lease.node, response.status
    if not 400 <= status < 600:
        response.abort()  # it may be of any length
        outcome, status = Outcome.SERVER_ERROR, 502
    else:
        body = await _whole(response, ERROR_BYTES) or b""
        problem = error_text(status, body) if is_web_page(body) else problem
    answer = error_answer(node.name, node.kind, status, response.headers, problem)
    if rule_for_outcome(outcome).fail_over:
        return _failed(lease, outcome, BackendStatus(problem, status=status, node=node.name), answer)
    lease.release(outcome)
    return answer


def _status_error(lease: Lease, response: UpstreamResponse, body: bytes) -> BackendStatus:
    return BackendStatus(f"it answered {response.status}", status=response.status, body=body, node=lease.node.name)


async def _held(lease: Lease, response: UpstreamResponse, call: HttpCall) -> WholeAnswer | FailedAttempt:
    node = lease.node
    body = await _whole(response, HELD_BYTES)
    if body is None:
        return _failed(lease, Outcome.CUT, StreamCut("the answer is larger than can be held", node=node.name))
    counters = find_counters(body) if generates_text(call.path) else None
    if counters is not None and counters.tokens:
        node.meter.add(min(counters.tokens, len(body)))  # a token that came is a byte at least
    lease.release(Outcome.SERVED, counters=counters)
    return WholeAnswer(node.name, node.kind, response.status, response.headers, body, counters)


async def _generated(
    lease: Lease, response: UpstreamResponse, continuation: Continuation
) -> OpenedStream | FailedAttempt:
    """Up to the first whole frame: until then the client has nothing, and another node can be asked anew."""
    node = lease.node
    unread = b""
    while True:
        if unread:
            await response.wait_turn()
        data = unread or await response.read()
        data, unread = data[:FRAME_SLICE_BYTES], data[FRAME_SLICE_BYTES:]
        first = continuation.feed(data) if data else continuation.finish_body()
        if first:
            lease.mark_answer_started()
            return OpenedStream(lease, response, continuation, first, unread)
        if continuation.cut_reason is not None:
            response.abort()
            message = continuation.cut_reason
            answer = WholeAnswer(node.name, node.kind, 500, response.headers, continuation.error_frame(message))
            error = BackendStatus(f"it answered with an error: {message}", status=500, body=data, node=node.name)
            return _failed(lease, Outcome.SERVER_ERROR, error, answer)
        if not data:
            words = "the answer ended before its first frame"
            return replace(_failed(lease, Outcome.CUT, StreamCut(words, node=node.name)), request_sent=True)


async def _whole(response: UpstreamResponse, limit: int) -> bytes | None:
    """The body to its end; ``None`` when it is longer than ``limit``, and then the rest is not read."""
    pieces: list[bytes] = []
    size = 0
    while data := await response.read():
        size += len(data)
        if size > limit:
            response.abort()
            return None
        pieces.append(data)
    return b"".join(pieces)


def _headers(lease: Lease, call: HttpCall) -> list[tuple[str, str]]:
    target = lease.node.target
    headers = [*call.headers]
    if target is not None:
        headers.append(("Host", host_header(target)))
    key = lease.node.api_key()
    if key is not None:
        headers = [pair for pair in headers if pair[0].lower() not in ("authorization", "x-api-key")]
        headers.append(("Authorization", f"Bearer {key}"))
    return headers


def _server_name(lease: Lease) -> str | None:
    """For TLS through a tunnel: the certificate names the host's own name, not our end of the tunnel."""
    target = lease.node.target
    return target.host if target is not None and target.scheme == "https" else None
