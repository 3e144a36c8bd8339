"""Learns from the durations in Ollama's answers how many requests a node really runs in parallel. Pure.

Ollama never answers 503 because a GPU is busy: requests past ``OLLAMA_NUM_PARALLEL`` wait inside it, unseen. But its
final frame gives durations, and ``total - load - prompt_eval - eval`` is the time that the request waited inside
(docs/internals/ollama.md, "Queueing"). So when the proven number of requests is in flight and more wait, one more is
sent. If that request waited inside the server, the proven number is the limit. If not, the proven number grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# On an idle server the time that no duration covers stays below the larger of these two. The share is of the total.
NOISE_MS = 50.0
NOISE_SHARE = 0.05
CEILING_S = 300.0  # how long the proven number is the limit before one request more is tried again


@dataclass(frozen=True, slots=True)
class ParallelLimit:
    """What is known about how many requests a node runs in parallel.

    ``proven``: the largest number of requests that ran together without waiting inside the server. ``ceiling_until``:
    until this time (seconds of the caller's clock) at most ``proven`` requests may be in flight; ``None``: one more may
    be tried."""

    proven: int = 1
    ceiling_until: float | None = None

    def max_in_flight(self, now: float) -> int:
        """The most requests that may be in flight now: one more than ``proven``, or exactly ``proven`` for
        ``CEILING_S`` after a request waited inside the server."""
        has_ceiling = self.ceiling_until is not None and now < self.ceiling_until
        return self.proven if has_ceiling else self.proven + 1


def learn_limit(
    limit: ParallelLimit, *, waited_ms: float | None, total_ms: float | None, concurrent: int, now: float
) -> ParallelLimit:
    """Returns the limit after one answer. It is ``limit`` itself if the answer shows nothing new.

    ``waited_ms`` is the part of ``total_ms`` in which the request waited inside the server. Both are the server's own
    durations, ``None`` if the server gave none. ``concurrent`` counts the requests that were in flight on the node when
    this request was sent, this request included. ``now`` is in seconds.
    """
    if waited_ms is None or total_ms is None:
        return limit
    has_waited = waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms)
    exceeds_proven = concurrent > limit.proven
    if has_waited and exceeds_proven:  # one request more than the proven number was too many
        return ParallelLimit(limit.proven, now + CEILING_S)
    if has_waited:
        # Even the proven number is too high now: the server was restarted with fewer slots, or other clients use it.
        return ParallelLimit(max(limit.proven - 1, 1), now + CEILING_S)
    if exceeds_proven:  # more requests than ever before have run together, and this one did not wait
        return replace(limit, proven=concurrent)
    return limit
