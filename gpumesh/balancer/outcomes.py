"""``Outcome``: how an attempt ended; the table of its consequences; how often a request is tried. Pure.

The table says whether another node is tried, whether the outcome counts against the node's breaker, whether the tunnel
is checked, and the outcome of the request if this attempt was its last (served, failed or cancelled). Before the first
byte of an answer any failure of a node moves the request to another node. A 4xx for a mistake of the client is passed
on as it is. A client's cancel, a 4xx, a 429 and a 529 are no fault of the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import NamedTuple

from gpumesh.backends.error_meanings import (
    NOT_SUPPORTED_STATUS,
    is_busy_status,
    is_load_failure,
    says_model_is_missing,
)


class Outcome(StrEnum):
    """How one attempt ended. ``BUSY``: the server answered 429 or 529. ``NOT_SUPPORTED``: the server answered 501.
    ``TIMED_OUT``: the server fell silent within an answer. ``CUT``: the answer stopped short. ``STREAM_ERROR``: the
    server reported an error within an answer. ``CANNOT_CONTINUE``: the node cannot continue an answer that another node
    began. ``DEADLINE``: the time that the client gave the request has passed. ``STALE_CONNECTION``: a kept-alive
    connection ended when the request was sent, before a server can have worked on it; the attempt goes on over a new
    connection. ``PROXY_REFUSED``: a status of 4xx with a web page, or another body that no inference server sends; or
    a status that is about the hop and not about the request (408 …).
    ``TOO_LONG``: a frame of a stream is longer than is read here."""

    SERVED = "served"
    CLIENT_GONE = "client-gone"
    CLIENT_ERROR = "client-error"
    MODEL_NOT_FOUND = "model-not-found"
    BUSY = "busy"
    NOT_SUPPORTED = "not-supported"
    SERVER_ERROR = "server-error"
    UNREACHABLE = "unreachable"
    TIMED_OUT = "timed-out"
    CUT = "cut"
    STREAM_ERROR = "broken"
    CANNOT_CONTINUE = "unfit"
    DEADLINE = "deadline"
    STALE_CONNECTION = "stale-connection"
    PROXY_REFUSED = "proxy-refused"
    TOO_LONG = "too-long"


class RequestOutcome(StrEnum):
    """How a request ended as a whole. ``REFUSED``: the client made a mistake and no node was asked."""

    SERVED = "served"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


class Blame(StrEnum):
    """What an outcome shows to be broken. ``MODEL_LOAD``: the server said that it cannot load the model. ``MODEL``: the
    server failed before it had loaded the model; the reason is not known. ``MISSING_MODEL``: the server answered that
    it does not have the model."""

    NOBODY = "nobody"
    NODE = "node"
    MODEL_LOAD = "model-load"
    MODEL = "model"
    MISSING_MODEL = "missing-model"


class ErrorReply(NamedTuple):
    """The error that a server reported. ``message`` is safe to print.

    ``foreign``: why no inference server sent this answer, but a proxy, a login page or another program, as a sentence
    whose subject is "it"; without any text of the body. ``None``: an inference server may have sent it."""

    status: int
    message: str
    foreign: str | None = None


class AttemptContext(NamedTuple):
    """The circumstances of an attempt that matter for the blame.

    ``takes_slot`` is false for a request that costs no inference. ``model`` is the full name of the demanded model.
    ``was_loaded``: the model was in the server's memory when the request was sent; ``None`` if that is not known.
    ``reply`` is the server's error, if the server reported one. ``is_known_route`` is false for a route that the server
    may not have: an error there says nothing about the node.
    """

    takes_slot: bool
    model: str | None
    was_loaded: bool | None
    reply: ErrorReply | None
    is_known_route: bool = True


@dataclass(frozen=True, slots=True)
class OutcomeRule:
    """The consequences of one outcome.

    ``fail_over``: another node is tried, if the client has not got a byte yet. ``counts_against_node``: the outcome is
    a failure for the node's breaker, or for the breaker of the model on this node (``find_blame``). ``request``: the
    outcome of the request if this attempt was its last. ``check_tunnel``: the node's tunnel checks its connection at
    once.
    """

    fail_over: bool
    counts_against_node: bool
    request: RequestOutcome = RequestOutcome.FAILED
    check_tunnel: bool = False


_SERVED, _CANCELLED = RequestOutcome.SERVED, RequestOutcome.CANCELLED
_RULES = {
    Outcome.SERVED: OutcomeRule(fail_over=False, counts_against_node=False, request=_SERVED),
    Outcome.CLIENT_GONE: OutcomeRule(fail_over=False, counts_against_node=False, request=_CANCELLED),
    Outcome.CLIENT_ERROR: OutcomeRule(fail_over=False, counts_against_node=False, request=_SERVED),
    Outcome.MODEL_NOT_FOUND: OutcomeRule(fail_over=True, counts_against_node=False),
    Outcome.BUSY: OutcomeRule(fail_over=True, counts_against_node=False),
    # The server works, but cannot do this: llama-server answers 501 to a request for embeddings if it was started
    # without them. The server of another node may be able to.
    Outcome.NOT_SUPPORTED: OutcomeRule(fail_over=True, counts_against_node=False),
    Outcome.SERVER_ERROR: OutcomeRule(fail_over=True, counts_against_node=True),
    Outcome.UNREACHABLE: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.TIMED_OUT: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.CUT: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.STREAM_ERROR: OutcomeRule(fail_over=True, counts_against_node=True),
    Outcome.CANNOT_CONTINUE: OutcomeRule(fail_over=True, counts_against_node=False),
    # The client's own deadline has passed. That shows a slow model, not a broken node.
    Outcome.DEADLINE: OutcomeRule(fail_over=False, counts_against_node=False),
    Outcome.STALE_CONNECTION: OutcomeRule(fail_over=True, counts_against_node=False),
    # A proxy's own limits and rules (413, 403 …) are not those of the server behind it, nor of other nodes. But it may
    # be the request that the proxy does not like.
    Outcome.PROXY_REFUSED: OutcomeRule(fail_over=True, counts_against_node=False),
    Outcome.TOO_LONG: OutcomeRule(fail_over=True, counts_against_node=False),  # the bound is ours
}

# When every node has failed a request, nodes that were lost or busy are asked again after a pause that grows. Each such
# pass over the nodes is a round.
MAX_ROUNDS = 5  # of one request, the first round included
_RETRYABLE = frozenset({Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT, Outcome.STREAM_ERROR, Outcome.BUSY})

# These are about the hop between the gateway and the server, of which the client knows nothing: a proxy wants a login,
# the server did not read the request in time (or closes an idle connection with these words), is not the one that the
# connection is for, or wants the request again later.
_HOP_STATUSES = frozenset({407, 408, 421, 425})

# When this many servers themselves (not the network or a proxy) have failed at a request, it is not sent to another
# server: the request itself may be the cause.
MAX_SERVER_FAILURES = 2
# A server that failed at this very request answers with this status. A proxy in front of the server answers with a
# status from 502 upwards.
SERVER_ERROR_STATUS = 500


def rule_for_outcome(outcome: Outcome) -> OutcomeRule:
    return _RULES[outcome]


def find_blame(outcome: Outcome, context: AttemptContext) -> Blame:
    """What an outcome shows to be broken, and so which breaker it counts for: that of the node, that of the model on
    this node, or none.

    A request without a slot needs no inference. For such a request a status of 5xx is about the model store: Ollama
    sends 500, for example, when it cannot copy a model. That does not show that the node generates badly.
    """
    reply, model = context.reply, context.model
    if outcome is Outcome.MODEL_NOT_FOUND:
        # On a route that is not known, the client may have asked for anything: what is missing need not be the model.
        if not (context.takes_slot and context.is_known_route) or reply is None or model is None:
            return Blame.NOBODY
        # A 404 can also mean that the server does not know the path. Then its message does not name the model.
        return Blame.MISSING_MODEL if says_model_is_missing(reply.status, reply.message, model) else Blame.NOBODY
    if not rule_for_outcome(outcome).counts_against_node:
        return Blame.NOBODY
    if outcome is Outcome.SERVER_ERROR and not (context.takes_slot and context.is_known_route):
        return Blame.NOBODY
    if reply is None or model is None or not context.takes_slot:
        return Blame.NODE
    if is_load_failure(reply.status, reply.message):
        return Blame.MODEL_LOAD
    # A server that had to load the model, and answers 500 instead of a first token, has failed while it loaded the
    # model, or just after. ``was_loaded`` may also be None (not known): that is not enough to blame the model.
    is_own_500 = reply.status == SERVER_ERROR_STATUS and reply.foreign is None
    failed_before_answer = outcome is Outcome.SERVER_ERROR and is_own_500
    if failed_before_answer and context.was_loaded is False:
        return Blame.MODEL
    return Blame.NODE


def request_outcome(outcome: Outcome) -> RequestOutcome:
    """The outcome of a request whose last attempt had this outcome."""
    return _RULES[outcome].request


def is_retryable(outcome: Outcome) -> bool:
    """Whether the same node may succeed if it is asked again in a moment. A server that answered with a 4xx or 5xx
    other than 429 and 529 would probably give the same answer again."""
    return outcome in _RETRYABLE


def retry_delay_s(rounds: int, rng: Random) -> float:
    """The pause in seconds after the round with this number (1, 2 …): 0.1, 0.2, 0.4 … s, each times a random factor of
    0.75 to 1.25, so that requests that failed together do not come back together."""
    return float(0.1 * 2 ** (rounds - 1) * rng.uniform(0.75, 1.25))


def classify_status(status: int, *, model_asked: bool) -> Outcome:
    """The outcome that an HTTP status means. ``model_asked``: the request names a model, so 404 is about this model.

    Every status from 500 upwards moves the request to another node: those of servers and those of proxies in front of
    them (502 to 504, 520 to 530 of Cloudflare, 598, 599 …). Ollama answers 404 only for a model that it does not have.
    Ollama answers 503 when its queue is full, but so does a server that starts or stops: therefore a 503 counts against
    the node. Some 4xx are about the way of the request (``_HOP_STATUSES``). Any other 4xx than 404, 405 and 429 is an
    answer about the request itself: the client gets it as it is."""
    if status < 400:
        return Outcome.SERVED
    if is_busy_status(status):
        return Outcome.BUSY
    if status >= 500:
        return Outcome.NOT_SUPPORTED if status == NOT_SUPPORTED_STATUS else Outcome.SERVER_ERROR
    if status == 404 and model_asked:
        return Outcome.MODEL_NOT_FOUND
    if status in _HOP_STATUSES:
        return Outcome.PROXY_REFUSED
    if status == 405 and model_asked:  # the server does not have this route, or not for this method
        return Outcome.NOT_SUPPORTED
    return Outcome.CLIENT_ERROR
