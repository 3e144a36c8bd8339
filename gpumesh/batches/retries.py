"""Decides whether a request that has failed is sent again: for batches, and for the prompts of `gpumesh run -f`. Pure.

A try counts if the request itself may be the cause. What says nothing about the request does not count: the queue is
full, every node is away, the quota of the key is used up. Then the request waits, for the whole window if need be.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.batches.values import Reply
from gpumesh.errors import (
    GPUMeshError,
    MeshNotRunning,
    ModelMissing,
    NoNodeError,
    QueueFull,
    ServersFailed,
    StreamCut,
    UsageError,
)

MAX_TRIES = 4  # so many failures that count; the last one is the request's result
MAX_LOST = 10  # so often the process may be killed while the request is under way: the request may be the cause
FIRST_DELAY_S = 5.0  # after the first try that counts; each later delay is four times as long
LONGEST_DELAY_S = 300.0
AWAY_DELAY_S = 10.0  # while no node can be reached
LONGEST_WAIT_S = 3600.0  # for what names its own time: a quota may begin anew next month, or be raised before


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The request is sent again after ``delay_s``. ``counts``: this try counts. Where it does not count, most other
    requests of the batch would fail in the same way now, so that the whole batch waits."""

    delay_s: float
    counts: bool


def judge_error(error: GPUMeshError, tries: int, *, is_shared: bool = False) -> TryAgain | None:
    """What follows from an error without an answer. ``None``: it is the result. ``tries``: those before that count.
    ``is_shared``: the next try may be another gateway's, which may have other nodes."""
    status = getattr(error, "status", None)
    retry_after_s = getattr(error, "retry_after_s", None)
    again = TryAgain(min(FIRST_DELAY_S * 4.0**tries, LONGEST_DELAY_S), counts=True) if tries + 1 < MAX_TRIES else None
    match error:
        case QueueFull():
            return TryAgain(error.retry_after_s, counts=False)
        case StreamCut():
            return None if again is None else TryAgain(0.0, counts=True)
        case ServersFailed():
            return again if tries == 0 else None  # two servers have failed at it, and two more may do so
        case ModelMissing() | UsageError():  # no node has the model, not even one that is away; a node is not known
            return again if is_shared else None
        case NoNodeError() if error.was_tried:
            return again
        case NoNodeError():
            return TryAgain(min(retry_after_s or AWAY_DELAY_S, LONGEST_DELAY_S), counts=False)
        case MeshNotRunning():
            return TryAgain(1.0, counts=False)
    if status == 429:  # of the gateway's own rules, or of a server
        return TryAgain(_bound_wait(retry_after_s), counts=False)
    if isinstance(status, int) and 400 <= status < 500 and status != 408:
        return None
    return again


def judge_reply(reply: Reply, tries: int) -> TryAgain | None:
    """What follows from an answer. ``None``: it is the result. ``tries``: those before that count."""
    if reply.status == 429 or (reply.status == 503 and reply.retry_after_s is not None):
        return TryAgain(_bound_wait(reply.retry_after_s), counts=False)
    if (reply.status < 500 and reply.status != 408) or tries + 1 >= MAX_TRIES:
        return None
    return TryAgain(min(FIRST_DELAY_S * 4.0**tries, LONGEST_DELAY_S), counts=True)


def _bound_wait(retry_after_s: float | None) -> float:
    """A time to wait that was asked for, within sensible bounds."""
    return min(max(retry_after_s or AWAY_DELAY_S, 0.1), LONGEST_WAIT_S)
