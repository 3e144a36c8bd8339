"""``read_answer`` reads the answer of a node to a request: as a whole, up to its first bytes, or as a failure.

An answer that is held until it is complete can still come from another node. So the answers that are no answers of an
inference server are found here, before the client gets a byte: web pages, redirects, empty bodies, errors with status
200.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from gpumesh.backends.answer_head import OCTETS
from gpumesh.backends.base import HttpCall, ServerCounters
from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.stream_formats import count_text_bytes, generates_text
from gpumesh.backends.continuation.whole_answers import find_failed_reason, find_text_problem, is_cut_short
from gpumesh.backends.dialects import find_counters
from gpumesh.backends.error_meanings import is_proxy_status
from gpumesh.backends.error_text import error_text, find_reported_error, is_web_page
from gpumesh.balancer.outcomes import Outcome, classify_status, rule_for_outcome
from gpumesh.errors import BackendStatus, StreamCut
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests.answer import WholeAnswer, error_answer
from gpumesh.mesh.requests.failures import FailedAttempt, fail_attempt
from gpumesh.mesh.requests.upstream import UpstreamResponse

STREAMING_TYPES = frozenset({"application/x-ndjson", "text/event-stream"})
# An answer that does not stream is held until it is complete: if it is cut, another node can be asked. A longer answer
# than this is passed on as it comes.
HELD_BYTES = 32 << 20
BLANK_BYTES = 64  # a body of more bytes is no blank body
# An answer in one of these types is never blank. In other types it may be: the text of a recording of silence is.
_NEVER_BLANK_TYPES = frozenset({"", "application/json", "application/x-ndjson", "text/event-stream", OCTETS})
ERROR_BYTES = 1 << 20  # limit for an error's body


class OpenedStream(msgspec.Struct, frozen=True, eq=False):
    """A stream that has begun, and holds its lease. The client gets ``first_bytes`` first, and then the rest of
    ``response``. ``continuation`` is ``None`` for a stream without generated text (the progress of a pull …)."""

    lease: Lease
    response: UpstreamResponse
    continuation: Continuation | None
    first_bytes: bytes


def take_whole_answer(lease: Lease, response: UpstreamResponse, call: HttpCall) -> WholeAnswer | FailedAttempt | None:
    """Does the work of ``read_answer`` for an answer that has come as a whole already, as most do that do not stream.
    ``None`` if ``read_answer`` must read it. No coroutine is made here: each costs time."""
    if response.status != 200 or response.problem is not None or response.content_type in STREAMING_TYPES:
        return None
    body = response.take_whole(HELD_BYTES)
    return None if body is None else _build_whole_answer(lease, response, call, body)


async def read_answer(
    lease: Lease, call: HttpCall, continuation: Callable[[], Continuation] | None, response: UpstreamResponse
) -> WholeAnswer | OpenedStream | FailedAttempt:
    """Reads an answer as a whole if it does not stream, and a stream up to its first bytes. Returns the failure if
    another node may succeed."""
    outcome = classify_status(response.status, model_asked=lease.model is not None)
    if response.problem is not None:
        return await _replace_answer(lease, response, outcome, response.problem)
    if outcome is not Outcome.SERVED:
        return await _read_error(lease, response, outcome)
    if response.content_type in STREAMING_TYPES:
        if continuation is not None and generates_text(call.path):
            return await _read_first_frame(lease, response, continuation())
        return _open_unread_stream(lease, response, await response.read())
    announced_bytes = response.content_length or 0  # an answer without a length is held too, while it is short enough
    if announced_bytes > HELD_BYTES:
        return _open_unread_stream(lease, response, await response.read())
    body, is_whole = await _read_up_to(response, HELD_BYTES)
    if not is_whole:
        return _open_unread_stream(lease, response, body)
    return _build_whole_answer(lease, response, call, body)


async def _read_error(lease: Lease, response: UpstreamResponse, outcome: Outcome) -> WholeAnswer | FailedAttempt:
    """Reads an answer whose status is an error. Returns a failure if another node may succeed; otherwise the answer
    itself, which the client gets."""
    node, status = lease.node, response.status
    body = await read_at_most(response, ERROR_BYTES)
    if body is None:
        problem = f"it answered {status} with an error of more than {ERROR_BYTES >> 20} MiB, which is not passed on"
        headers = tuple(pair for pair in response.headers if pair[0] != "Content-Type")
        answer, body = error_answer(node.name, node.kind, status, headers, problem), b""
    else:
        answer = WholeAnswer(node.name, node.kind, status, response.headers, body)
    if rule_for_outcome(outcome).fail_over:
        foreign = f"it answered {status}, as a proxy does whose server does not answer"
        error = status_error(lease, response, body)
        return fail_attempt(lease, outcome, error, answer, foreign=foreign if is_proxy_status(status) else None)
    lease.release(outcome)
    return answer


async def _replace_answer(lease: Lease, response: UpstreamResponse, outcome: Outcome, problem: str) -> FailedAttempt:
    """Replaces an answer that does not come from an inference server, but from a proxy, a login page or a hostile host.
    Another node may give a true answer.

    No client may get the body of such an answer. An error keeps its status, but 404, which would tell the client that
    no node has the model, and any other status become a 502.
    """
    status, message = response.status, problem
    if 400 <= status < 600:
        body = await read_at_most(response, ERROR_BYTES) or b""
        if is_web_page(body):
            message = error_text(status, body)
        if outcome in (Outcome.CLIENT_ERROR, Outcome.MODEL_NOT_FOUND):  # the client has made no mistake
            outcome = Outcome.PROXY_REFUSED
        status = 502 if status == 404 else status
    else:
        response.abort()  # the body is not read, because it may have any length
        outcome, status = Outcome.SERVER_ERROR, 502
    return _fail_foreign(lease, response, outcome, status, problem, client_message=message)


def _fail_foreign(
    lease: Lease,
    response: UpstreamResponse,
    outcome: Outcome,
    status: int,
    problem: str,
    *,
    client_message: str | None = None,
) -> FailedAttempt:
    """The failure of a node whose answer no inference server has sent. ``problem``: what shows this. If no other node
    answers, the client gets ``status`` and ``client_message``; ``None``: the client gets ``problem``."""
    node = lease.node
    message = problem if client_message is None else client_message
    headers = tuple(pair for pair in response.headers if pair[0] != "Content-Type")
    answer = error_answer(node.name, node.kind, status, headers, message)
    return fail_attempt(lease, outcome, BackendStatus(message, status=status, node=node.name), answer, foreign=problem)


def status_error(lease: Lease, response: UpstreamResponse, body: bytes) -> BackendStatus:
    """The error for an answer with an error status."""
    return BackendStatus(f"it answered {response.status}", status=response.status, body=body, node=lease.node.name)


def _build_whole_answer(
    lease: Lease, response: UpstreamResponse, call: HttpCall, body: bytes
) -> WholeAnswer | FailedAttempt:
    """Releases the lease, and returns the answer. Returns the failure if the body is no answer, whatever its status."""
    node = lease.node
    is_text = generates_text(call.path)
    counters = find_counters(body) if is_text else None
    failed = _find_failure(lease, response, call, body, counters, is_text=is_text)
    if failed is not None:
        return failed
    if counters is not None and counters.tokens:
        node.meter.add(min(counters.tokens, len(body)))  # a server may count wrongly: each token has at least one byte
    is_counted = counters is not None and lease.is_learned_from
    answer_bytes = count_text_bytes(call.path, body) if is_counted else None
    lease.release(Outcome.SERVED, counters=counters, answer_bytes=answer_bytes)
    return WholeAnswer(node.name, node.kind, response.status, response.headers, body, counters)


def _find_failure(
    lease: Lease,
    response: UpstreamResponse,
    call: HttpCall,
    body: bytes,
    counters: ServerCounters | None,
    *,
    is_text: bool,
) -> FailedAttempt | None:
    """The failure in a body with a status of success; ``None`` if it is a whole answer. ``counters``: the figures in
    the body, if it has any. ``is_text``: the route generates text. The body may be no answer of an inference server,
    may be cut short, or may report an error.

    Counters come at the end of an answer, so a body with counters passes most of the tests without being read again."""
    node = lease.node
    if lease.placement is not None:  # other requests, about a model store, may have an empty answer
        problem = _find_body_problem(response, body, is_text=is_text, may_be_empty=_may_be_empty(lease))
        if problem is None and (counters is None or response.status != 200):
            problem = find_text_problem(call.path, response.status, body)
        if problem is not None:
            return _fail_foreign(lease, response, Outcome.SERVER_ERROR, 502, problem)
    if counters is None and (is_text or response.ends_with_connection) and is_cut_short(call.path, body):
        return _fail_cut(lease, "the answer stopped short: its end is missing")
    message = find_failed_reason(body) if is_text else None
    if message is not None:
        error = BackendStatus(f"it answered with an error: {message}", status=500, node=node.name)
        return fail_attempt(lease, Outcome.SERVER_ERROR, error, error_answer(node.name, node.kind, 500, (), message))
    if is_text and counters is None:
        message = find_reported_error(body)
        if message is not None:
            answer = WholeAnswer(node.name, node.kind, 500, response.headers, body)
            error = BackendStatus(f"it answered with an error: {message}", status=500, body=body, node=node.name)
            return fail_attempt(lease, Outcome.SERVER_ERROR, error, answer)
    return None


def _may_be_empty(lease: Lease) -> bool:
    """Whether an answer without a body may be all that the client asked for: from a model store, or on a route of which
    nothing is known."""
    return lease.placement is None or not lease.placement.placed.demand.is_known_route


def _find_body_problem(response: UpstreamResponse, body: bytes, *, is_text: bool, may_be_empty: bool) -> str | None:
    """Why an inference server cannot have sent this body with a status of success; ``None`` if it can. ``is_text``: it
    should hold generated text."""
    if body.startswith((b"{", b"[")):  # nearly always
        return None
    is_never_blank = is_text or (response.content_type in _NEVER_BLANK_TYPES and not may_be_empty)
    if len(body) <= BLANK_BYTES and not body.strip() and is_never_blank:
        return f"it answered {response.status} with an empty body, as no inference server does"
    if response.content_type and is_web_page(body):
        return f"it answered {response.status} with a web page, which is no answer of an inference server"
    return None


def _open_unread_stream(lease: Lease, response: UpstreamResponse, first_bytes: bytes) -> OpenedStream | FailedAttempt:
    """Opens a stream that is passed on as it comes: a long answer, or a stream without generated text."""
    if not first_bytes and not _may_be_empty(lease):
        problem = f"it answered {response.status} with an empty body, as no inference server does"
        return _fail_foreign(lease, response, Outcome.SERVER_ERROR, 502, problem)
    lease.can_move = None  # the client gets these bytes, so no other node can give the answer
    return OpenedStream(lease, response, None, first_bytes)


async def _read_first_frame(
    lease: Lease, response: UpstreamResponse, continuation: Continuation
) -> OpenedStream | FailedAttempt:
    """Reads the stream up to its first token. Until then the client has received nothing: if the stream fails,
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
            if continuation.exceeds_bound:
                too_long = error_answer(node.name, node.kind, 502, (), f"it answered with {message}")
                return fail_attempt(lease, Outcome.TOO_LONG, StreamCut(message, node=node.name), too_long)
            answer = WholeAnswer(node.name, node.kind, 500, response.headers, continuation.error_frame(message))
            error = BackendStatus(f"it answered with an error: {message}", status=500, body=data, node=node.name)
            return fail_attempt(lease, Outcome.SERVER_ERROR, error, answer)
        if not data:
            return _fail_cut(lease, "the answer ended before its first token")


def _fail_cut(lease: Lease, message: str) -> FailedAttempt:
    """The failure of a node whose answer is not whole, although HTTP says so."""
    cut = StreamCut(message, node=lease.node.name)
    return replace(fail_attempt(lease, Outcome.CUT, cut), request_sent=True)


async def read_at_most(response: UpstreamResponse, limit: int) -> bytes | None:
    """Reads the whole body. ``None`` if it is longer than ``limit`` bytes: then the connection is closed."""
    body, is_whole = await _read_up_to(response, limit)
    if is_whole:
        return body
    response.abort()
    return None


async def _read_up_to(response: UpstreamResponse, limit: int) -> tuple[bytes, bool]:
    """Reads the body until it is whole, or longer than ``limit`` bytes. Returns the bytes, and whether they are the
    whole body."""
    pieces: list[bytes] = []
    size = 0
    while data := await response.read():
        pieces.append(data)
        size += len(data)
        if size > limit:
            return b"".join(pieces), False
    return b"".join(pieces), True
