"""``run_attempt`` sends one request to one node, and reads the answer up to its first bytes or as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import msgspec

from gpumesh.backends.base import ContinuationMethod, HttpCall
from gpumesh.backends.body_pieces import COPY_BYTES, join_pieces
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.dialects import DIALECTS, host_header
from gpumesh.backends.model_member import replace_in_query, replace_model, scan_model, scan_names_model
from gpumesh.balancer.outcomes import Outcome, classify_status, rule_for_outcome
from gpumesh.errors import BackendUnreachable, DeadlineExceeded, QueueFull, StreamCut
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests.answer import WholeAnswer
from gpumesh.mesh.requests.answer_reading import (
    ERROR_BYTES,
    OpenedStream,
    read_answer,
    read_at_most,
    status_error,
    take_whole_answer,
)
from gpumesh.mesh.requests.failures import FailedAttempt, fail_attempt, shortest_work_s
from gpumesh.mesh.requests.task_deadlines import TaskDeadline
from gpumesh.mesh.requests.upstream import Upstream, UpstreamResponse

T = TypeVar("T")


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
    read = partial(read_answer, lease, call, continuation)
    return _send_and_read(
        upstream, lease, call, read, take_answer=take_whole_answer, timeout_s=timeout_s, may_resend=may_resend
    )


async def ask_node(
    upstream: Upstream, lease: Lease, call: HttpCall, *, timeout_s: float
) -> tuple[int, bytes] | FailedAttempt:
    """Sends a short question to the node during a request. Returns the answer's status and body, or the failure.

    The lease stays held, unless the node failed. A node that only takes too long has not failed: then the status is 0
    and the body is empty. A 404 of Ollama is a failure, because Ollama has all routes that we ask. Another kind of
    server may lack the route, so its 404 is an answer.
    """

    async def read_answer(response: UpstreamResponse) -> tuple[int, bytes] | FailedAttempt:
        """Returns the status and the body, or the failure of the node."""
        outcome = classify_status(response.status, model_asked=lease.model is not None)
        must_have_route = DIALECTS[lease.node.kind].continuation is ContinuationMethod.TEMPLATE
        lacks_route = response.status == HTTPStatus.NOT_FOUND and not must_have_route
        if rule_for_outcome(outcome).fail_over and not lacks_route:
            return fail_attempt(lease, outcome, status_error(lease, response, b""))
        if response.problem is not None:  # no inference server sent this answer, so its body says nothing
            response.abort()
            return 502, b""
        # A rendered prompt is as long as the prompt in the question, and longer where characters are escaped.
        return response.status, await read_at_most(response, ERROR_BYTES + 4 * len(call.body)) or b""

    return await _send_and_read(upstream, lease, call, read_answer, timeout_s=timeout_s, result_on_timeout=(0, b""))


async def with_model(call: HttpCall, name: str, try_reserve_memory: Callable[[int], bool]) -> HttpCall:
    """Returns the call with ``name`` as the name of its model. A long body is copied in steps, so that other requests
    run between them. ``try_reserve_memory`` reserves the memory for such a copy. Raises QueueFull if there is no memory
    for it."""
    if len(call.body) <= COPY_BYTES:
        pieces = replace_model(call.body, name)
    else:
        pieces = await _run_steps(scan_model(call.body, name))
    if pieces is None:  # the body has this name already, or names no model
        is_in_query = "model=" in call.path and not await _run_steps(scan_names_model(call.body))
        path = replace_in_query(call.path, name) if is_in_query else None
        return call if path is None else msgspec.structs.replace(call, path=path)
    size = sum(map(len, pieces))
    if size <= COPY_BYTES:
        return msgspec.structs.replace(call, body=b"".join(pieces))
    if not try_reserve_memory(size):
        raise QueueFull("the bodies of other requests take all the memory that they may", retry_after_s=1.0)
    return msgspec.structs.replace(call, body=await _run_steps(join_pieces(pieces)))


async def _run_steps(work: Generator[None, None, T]) -> T:
    """Runs the generator, lets other requests run between its steps, and returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
        await asyncio.sleep(0)


async def _send_and_read(
    upstream: Upstream,
    lease: Lease,
    call: HttpCall,
    read_answer: Callable[[UpstreamResponse], Awaitable[T | FailedAttempt]],
    *,
    timeout_s: float,
    take_answer: Callable[[Lease, UpstreamResponse, HttpCall], T | FailedAttempt | None] = lambda *_: None,
    result_on_timeout: T | None = None,
    may_resend: bool = True,
) -> T | FailedAttempt:
    """Sends the request, and returns what ``take_answer`` makes of the response at once, else what ``read_answer``
    makes of it, or the failure.

    Any failure closes the connection, so that the server stops its work, and releases the lease. Only a time-out is
    different if there is a ``result_on_timeout``: this result is returned, and the lease stays held. ``may_resend``:
    see ``run_attempt``.
    """
    node = lease.node
    target = node.target
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
                host=None if target is None else host_header(target),
                # Through a tunnel the certificate has the name of the host, not the address of our end of the tunnel.
                server_name=target.host if target is not None and target.scheme == "https" else None,
                new_connection=not may_resend,
                may_resend=start_resending,
            )
            result = take_answer(lease, response, call)
            if result is None:
                result = await read_answer(response)
            if isinstance(result, FailedAttempt):
                return replace(result, duration_s=loop.time() - started_at, was_resent=was_resent)
            lease.set_abort_callback(response.abort)
            return result
    except TimeoutError:
        if response is not None:
            response.abort()
        if lease.aborted:
            return replace(_fail_unreachable(lease), request_sent=True, was_resent=was_resent)
        if result_on_timeout is not None:
            return result_on_timeout
        return fail_attempt(
            lease, Outcome.DEADLINE, DeadlineExceeded(f"no answer within {timeout_s:.0f} s", node=node.name)
        )
    except BackendUnreachable as error:
        failed = fail_attempt(lease, Outcome.UNREACHABLE, error)
        duration_s = loop.time() - started_at
        return replace(failed, request_sent=error.request_sent, duration_s=duration_s, was_resent=was_resent)
    except StreamCut as error:
        failed = fail_attempt(lease, Outcome.CUT, error)
        return replace(failed, request_sent=True, duration_s=loop.time() - started_at, was_resent=was_resent)
    except BaseException:  # a cancellation, because the client has gone; or a bug of ours
        if response is not None:
            response.abort()
        lease.release(Outcome.CLIENT_GONE)
        raise


def _fail_unreachable(lease: Lease) -> FailedAttempt:
    """Releases the lease of a node whose tunnel was lost, and returns the failure."""
    error = BackendUnreachable("the way to it was lost", node=lease.node.name)
    return fail_attempt(lease, Outcome.UNREACHABLE, error)


def _request_headers(lease: Lease, call: HttpCall) -> Sequence[tuple[str, str]]:
    """The call's headers, as pairs of name and value. If the node has an API key, it replaces the client's own key."""
    key = lease.node.api_key()
    if key is None:
        return call.headers
    other_headers = [pair for pair in call.headers if pair[0].lower() not in ("authorization", "x-api-key")]
    return [*other_headers, ("Authorization", f"Bearer {key}")]
