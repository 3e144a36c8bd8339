"""``run_attempt`` sends one request to one node, and reads the answer up to its first bytes or as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import TypeVar

import msgspec

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.stream_formats import count_text_bytes, generates_text
from gpumesh.backends.dialects import find_counters, host_header
from gpumesh.backends.error_text import error_text, is_web_page
from gpumesh.backends.model_member import replace_model
from gpumesh.balancer.outcomes import ErrorReply, Outcome, classify_status, rule_for_outcome
from gpumesh.errors import BackendStatus, BackendUnreachable, DeadlineExceeded, GPUMeshError, QueueFull, StreamCut
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests.answer import WholeAnswer, error_answer
from gpumesh.mesh.requests.failures import FailedAttempt, shortest_work_s
from gpumesh.mesh.requests.task_deadlines import TaskDeadline
from gpumesh.mesh.requests.upstream import Upstream, UpstreamResponse

STREAMING_TYPES = frozenset({"application/x-ndjson", "text/event-stream"})
# Limit for an answer that does not stream. It is held until it is complete: if it is cut, another node can be asked.
HELD_BYTES = 32 << 20
COPY_BYTES = 1 << 20  # bytes of a body that are copied in one step
ERROR_BYTES = 1 << 20  # limit for an error's body, and for the answer to ``ask_node``

T = TypeVar("T")


class OpenedStream(msgspec.Struct, frozen=True, eq=False):
    """A stream that has begun, and holds its lease. The client gets ``first_bytes`` first, and then the rest of
    ``response``. ``continuation`` is ``None`` for a stream without generated text (the progress of a pull …)."""

    lease: Lease
    response: UpstreamResponse
    continuation: Continuation | None
    first_bytes: bytes


def run_attempt(
    upstream: Upstream,
    lease: Lease,
    call: HttpCall,
    *,
    timeout_s: float,
    continuation: Callable[[], Continuation] | None = None,
    may_resend: bool = True,
) -> Awaitable[WholeAnswer | OpenedStream | FailedAttempt]:
    """Sends the request to the leased node. Returns a whole answer, a stream that has begun, or the failure.

    ``continuation`` creates the reader of a stream with generated text; without it every stream is passed on unread.
    ``may_resend``: the request may go over a kept-alive connection, and is sent a second time if that connection ends
    before a server can have worked on the request. Otherwise the request goes over a new connection.

    Releases the lease, unless the result is an OpenedStream, which holds it. A cancelled attempt releases it as well.
    """
    read_answer = partial(_read_answer, lease, call, continuation)
    return _send_and_read(upstream, lease, call, read_answer, timeout_s=timeout_s, may_resend=may_resend)


async def _read_answer(
    lease: Lease, call: HttpCall, continuation: Callable[[], Continuation] | None, response: UpstreamResponse
) -> WholeAnswer | OpenedStream | FailedAttempt:
    """Reads an answer as a whole if it does not stream, and a stream up to its first bytes. Returns the failure if
    another node may succeed."""
    outcome = classify_status(response.status, model_asked=lease.model is not None)
    if response.problem is not None:
        return await _replace_answer(lease, response, outcome, response.problem)
    if outcome is not Outcome.SERVED:
        return await _read_error(lease, response, outcome)
    # An answer without a length is held too: while it is read, its size is watched.
    announced_bytes = response.content_length or 0
    if response.content_type not in STREAMING_TYPES and announced_bytes <= HELD_BYTES:
        whole_body = response.take_whole(HELD_BYTES)
        if whole_body is None:
            whole_body = await _read_at_most(response, HELD_BYTES)
        return _build_whole_answer(lease, response, call, whole_body)
    if continuation is not None and generates_text(call.path):
        return await _read_first_frame(lease, response, continuation())
    return OpenedStream(lease, response, None, await response.read())


async def ask_node(
    upstream: Upstream, lease: Lease, call: HttpCall, *, timeout_s: float
) -> tuple[int, bytes] | FailedAttempt:
    """Sends a short question to the node during a request. Returns the answer's status and body, or the failure.

    The lease stays held, unless the node failed. A node that only takes too long has not failed: then the status is 0
    and the body is empty.
    """

    async def read_answer(response: UpstreamResponse) -> tuple[int, bytes] | FailedAttempt:
        """Returns the status and the body, or the failure of the node."""
        outcome = classify_status(response.status, model_asked=lease.model is not None)
        if rule_for_outcome(outcome).fail_over:
            return _fail(lease, outcome, _status_error(lease, response, b""))
        if response.problem is not None:  # no inference server sent this answer, so its body says nothing
            response.abort()
            return 502, b""
        return response.status, await _read_at_most(response, ERROR_BYTES) or b""

    return await _send_and_read(upstream, lease, call, read_answer, timeout_s=timeout_s, result_on_timeout=(0, b""))


async def with_model(call: HttpCall, name: str, try_reserve_memory: Callable[[int], bool]) -> HttpCall:
    """The call with this name of its model. A long body is copied in steps, with turns of other requests between them.
    ``try_reserve_memory`` is asked for the memory of such a copy. Raises QueueFull if there is no room for it."""
    parts = replace_model(call.body, name)
    if parts is None:  # the body has this name already, or names no model
        return call
    head, rest = parts
    if len(rest) <= COPY_BYTES:
        return msgspec.structs.replace(call, body=head + rest)
    if not try_reserve_memory(len(rest)):
        raise QueueFull("the bodies of other requests take all the memory that they may", retry_after_s=1.0)
    copy = BytesIO()
    copy.write(head)
    for start in range(0, len(rest), COPY_BYTES):
        copy.write(rest[start : start + COPY_BYTES])
        await asyncio.sleep(0)
    return msgspec.structs.replace(call, body=copy.getvalue())


async def _send_and_read(
    upstream: Upstream,
    lease: Lease,
    call: HttpCall,
    read_answer: Callable[[UpstreamResponse], Awaitable[T | FailedAttempt]],
    *,
    timeout_s: float,
    result_on_timeout: T | None = None,
    may_resend: bool = True,
) -> T | FailedAttempt:
    """Sends the request, and returns what ``read_answer`` makes of the response, or the failure.

    Any failure closes the connection, so that the server stops its work, and releases the lease. Only a time-out is
    different if there is a ``result_on_timeout``: this result is returned, and the lease stays held. ``may_resend``:
    see ``run_attempt``.
    """
    node = lease.node
    loop = upstream.deadlines.loop
    response: UpstreamResponse | None = None
    started_at = loop.time()
    was_resent = False

    def start_resending(waited_s: float) -> bool:
        """Returns whether the request may be sent again: no server can have worked on it in this time."""
        nonlocal started_at, was_resent
        if waited_s > shortest_work_s(node):
            return False
        started_at, was_resent = loop.time(), True
        lease.note_resent()
        return True

    if lease.aborted:  # the tunnel failed before the request was sent
        return _fail_unreachable(lease)
    try:
        # The tunnel's failure (``lease.aborted``) ends this block as the deadline does, with TimeoutError.
        with TaskDeadline(upstream.deadlines, timeout_s) as deadline:
            lease.set_abort_callback(deadline.expire)
            response = await upstream.request(
                node.base_url,
                call,
                _request_headers(lease, call),
                node=node.name,
                host=None if node.target is None else host_header(node.target),
                server_name=_server_name(lease),
                new_connection=not may_resend,
                may_resend=start_resending,
            )
            result = await read_answer(response)
            lease.set_abort_callback(response.abort)
            if isinstance(result, FailedAttempt):
                return replace(result, duration_s=loop.time() - started_at, was_resent=was_resent)
            return result
    except TimeoutError:
        if response is not None:
            response.abort()
        if lease.aborted:
            return replace(_fail_unreachable(lease), request_sent=True, was_resent=was_resent)
        if result_on_timeout is not None:
            return result_on_timeout
        return _fail(lease, Outcome.DEADLINE, DeadlineExceeded(f"no answer within {timeout_s:.0f} s", node=node.name))
    except BackendUnreachable as error:
        failed = _fail(lease, Outcome.UNREACHABLE, error)
        duration_s = loop.time() - started_at
        return replace(failed, request_sent=error.request_sent, duration_s=duration_s, was_resent=was_resent)
    except StreamCut as error:
        failed = _fail(lease, Outcome.CUT, error)
        return replace(failed, request_sent=True, duration_s=loop.time() - started_at, was_resent=was_resent)
    except BaseException:  # a cancellation, because the client has gone; or a bug of ours
        if response is not None:
            response.abort()
        lease.release(Outcome.CLIENT_GONE)
        raise


def _fail(lease: Lease, outcome: Outcome, error: GPUMeshError, answer: WholeAnswer | None = None) -> FailedAttempt:
    """Releases the lease with this outcome, and returns the failure. ``answer`` is the server's own error."""
    reply = None
    if isinstance(error, BackendStatus):
        # The server's own error is in the body. If there is no body, the message of our error has to do.
        message = error_text(error.status, error.body) if error.body else error.message
        reply = ErrorReply(error.status, message)
    lease.release(outcome, error=str(error), reply=reply)
    # The traceback's frames hold the request, which holds the error. This cycle would keep the request's body in memory
    # until the garbage collector runs.
    error.__traceback__ = None
    return FailedAttempt(lease.node.name, outcome, error, answer, request_sent=answer is not None, lease=lease)


def _fail_unreachable(lease: Lease) -> FailedAttempt:
    """Releases the lease of a node whose tunnel was lost, and returns the failure."""
    error = BackendUnreachable("the way to it was lost", node=lease.node.name)
    return _fail(lease, Outcome.UNREACHABLE, error)


async def _read_error(lease: Lease, response: UpstreamResponse, outcome: Outcome) -> WholeAnswer | FailedAttempt:
    """Reads an answer whose status is an error. Returns a failure if another node may succeed; otherwise the answer
    itself, which the client gets."""
    node = lease.node
    body = await _read_at_most(response, ERROR_BYTES) or b""
    answer = WholeAnswer(node.name, node.kind, response.status, response.headers, body)
    if rule_for_outcome(outcome).fail_over:
        return _fail(lease, outcome, _status_error(lease, response, body), answer)
    lease.release(outcome)
    return answer


async def _replace_answer(
    lease: Lease, response: UpstreamResponse, outcome: Outcome, problem: str
) -> WholeAnswer | FailedAttempt:
    """Replaces an answer that does not come from an inference server, but from a proxy, a login page or a hostile host.

    No client may get the body of such an answer. An error keeps its status; any other status becomes a 502. Returns a
    failure if another node may succeed.
    """
    node, status = lease.node, response.status
    if not 400 <= status < 600:
        response.abort()  # the body is not read, because it may have any length
        outcome, status = Outcome.SERVER_ERROR, 502
    else:
        body = await _read_at_most(response, ERROR_BYTES) or b""
        if is_web_page(body):
            problem = error_text(status, body)
    answer = error_answer(node.name, node.kind, status, response.headers, problem)
    if rule_for_outcome(outcome).fail_over:
        return _fail(lease, outcome, BackendStatus(problem, status=status, node=node.name), answer)
    lease.release(outcome)
    return answer


def _status_error(lease: Lease, response: UpstreamResponse, body: bytes) -> BackendStatus:
    """The error for an answer with an error status."""
    return BackendStatus(f"it answered {response.status}", status=response.status, body=body, node=lease.node.name)


def _build_whole_answer(
    lease: Lease, response: UpstreamResponse, call: HttpCall, body: bytes | None
) -> WholeAnswer | FailedAttempt:
    """Releases the lease, and returns the answer. If ``body`` is ``None``, it was too long to hold: this is a
    failure."""
    node = lease.node
    if body is None:
        return _fail(lease, Outcome.CUT, StreamCut("the answer is larger than can be held", node=node.name))
    counters = find_counters(body) if generates_text(call.path) else None
    if counters is not None and counters.tokens:
        node.meter.add(min(counters.tokens, len(body)))  # a server may count wrongly: each token has at least one byte
    is_counted = counters is not None and lease.is_learned_from
    answer_bytes = count_text_bytes(call.path, body) if is_counted else None
    lease.release(Outcome.SERVED, counters=counters, answer_bytes=answer_bytes)
    return WholeAnswer(node.name, node.kind, response.status, response.headers, body, counters)


async def _read_first_frame(
    lease: Lease, response: UpstreamResponse, continuation: Continuation
) -> OpenedStream | FailedAttempt:
    """Reads the stream up to its first whole frame. Until then the client has received nothing: if the stream fails,
    the failure is returned, and another node can get the request."""
    node = lease.node
    while True:
        data = await response.read_slice()
        first_bytes = continuation.feed(data) if data else continuation.finish_body()
        if first_bytes:
            lease.mark_answer_started()
            return OpenedStream(lease, response, continuation, first_bytes)
        if continuation.cut_reason is not None:  # an error before any text: as if the server had answered 500
            response.abort()
            message = continuation.cut_reason
            answer = WholeAnswer(node.name, node.kind, 500, response.headers, continuation.error_frame(message))
            error = BackendStatus(f"it answered with an error: {message}", status=500, body=data, node=node.name)
            return _fail(lease, Outcome.SERVER_ERROR, error, answer)
        if not data:
            cut = StreamCut("the answer ended before its first frame", node=node.name)
            return replace(_fail(lease, Outcome.CUT, cut), request_sent=True)


async def _read_at_most(response: UpstreamResponse, limit: int) -> bytes | None:
    """Reads the whole body. ``None`` if it is longer than ``limit`` bytes: then the connection is closed."""
    pieces: list[bytes] = []
    size = 0
    while data := await response.read():
        size += len(data)
        if size > limit:
            response.abort()
            return None
        pieces.append(data)
    return b"".join(pieces)


def _request_headers(lease: Lease, call: HttpCall) -> Sequence[tuple[str, str]]:
    """The call's headers, as pairs of name and value. If the node has an API key, it replaces the client's own key."""
    key = lease.node.api_key()
    if key is None:
        return call.headers
    other_headers = [pair for pair in call.headers if pair[0].lower() not in ("authorization", "x-api-key")]
    return [*other_headers, ("Authorization", f"Bearer {key}")]


def _server_name(lease: Lease) -> str | None:
    """The name that the TLS certificate must hold; ``None`` without TLS. Through a tunnel this is the name of the host,
    not the address of our end of the tunnel."""
    target = lease.node.target
    return target.host if target is not None and target.scheme == "https" else None
