"""What an attempt's end means: whose fault it was, and whether another node is tried. Pure; one table.

DESIGN section 5: before the first byte any failure of a node moves the request on; 4xx that are the client's own pass
through untouched. Section 6: a client's cancel, a 4xx or a 429 is no fault of the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Outcome(StrEnum):
    """How one attempt ended. ``TIMED_OUT``: silent in mid-answer; ``CUT``: the answer stopped short; ``STREAM_ERROR``:
    it said in mid-answer that it failed; ``CANNOT_CONTINUE``: it cannot go on with an answer that another node
    began."""

    SERVED = "served"
    CLIENT_GONE = "client-gone"
    CLIENT_ERROR = "client-error"
    MODEL_NOT_FOUND = "model-not-found"
    BUSY = "busy"
    SERVER_ERROR = "server-error"
    UNREACHABLE = "unreachable"
    TIMED_OUT = "timed-out"
    CUT = "cut"
    STREAM_ERROR = "broken"
    CANNOT_CONTINUE = "unfit"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class OutcomeRule:
    """``fail_over``: try another node, if no byte was sent. ``counts_against_node``: counts against the node's breaker.

    ``check_tunnel``: the node's tunnel should be checked at once.
    """

    fail_over: bool
    counts_against_node: bool
    check_tunnel: bool = False


_VERDICTS = {
    Outcome.SERVED: OutcomeRule(fail_over=False, counts_against_node=False),
    Outcome.CLIENT_GONE: OutcomeRule(fail_over=False, counts_against_node=False),
    Outcome.CLIENT_ERROR: OutcomeRule(fail_over=False, counts_against_node=False),
    Outcome.MODEL_NOT_FOUND: OutcomeRule(fail_over=True, counts_against_node=False),
    Outcome.BUSY: OutcomeRule(fail_over=True, counts_against_node=False),
    Outcome.SERVER_ERROR: OutcomeRule(fail_over=True, counts_against_node=True),
    Outcome.UNREACHABLE: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.TIMED_OUT: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.CUT: OutcomeRule(fail_over=True, counts_against_node=True, check_tunnel=True),
    Outcome.STREAM_ERROR: OutcomeRule(fail_over=True, counts_against_node=True),
    Outcome.CANNOT_CONTINUE: OutcomeRule(fail_over=True, counts_against_node=False),
    # The client's own deadline passed: a slow model is no broken node.
    Outcome.DEADLINE: OutcomeRule(fail_over=False, counts_against_node=False),
}


# When every node failed: those whose way was lost or who were busy are asked again, after a pause that grows.
MAX_ROUNDS = 5
_AGAIN = frozenset({Outcome.UNREACHABLE, Outcome.TIMED_OUT, Outcome.CUT, Outcome.STREAM_ERROR, Outcome.BUSY})


# A request at which so many servers failed by themselves is not given to another: it may be what makes them fail.
MAX_SERVER_FAILURES = 2
# The status by which a server says that it failed at this very request; 502 to 504 are said of it, by who is before it.
SERVER_ERROR_STATUS = 500


def is_retryable(outcome: Outcome) -> bool:
    """Whether the same node may do better in a moment; a server's error is taken at its word."""
    return outcome in _AGAIN


def retry_delay_s(rounds: int, rng: Random) -> float:
    """Before round ``rounds + 1``: 0.1, 0.2, 0.4 … s with a jitter of half of it."""
    return float(0.1 * 2 ** (rounds - 1) * rng.uniform(0.75, 1.25))


def rule_for_outcome(outcome: Outcome) -> OutcomeRule:
    return _VERDICTS[outcome]


def classify_status(status: int, *, model_asked: bool) -> Outcome:
    """What an HTTP status says about an attempt. Ollama answers 404 only for a model (facts/ollama-api.md);
    it says 503 when its queue is full, but a dying or starting server says it too, so 503 is the node's."""
    if status < 400:
        return Outcome.SERVED
    if status == 404 and model_asked:
        return Outcome.MODEL_NOT_FOUND
    if status == 429:
        return Outcome.BUSY
    if status in (500, 502, 503, 504):
        return Outcome.SERVER_ERROR
    return Outcome.CLIENT_ERROR
