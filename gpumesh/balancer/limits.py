"""Learns how many requests a node truly runs in parallel, from the server's own durations. Pure.

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
    """``proven``: the number of requests that ran together without waiting. ``ceiling_until``: until this time no more
    than that are sent; a time of the caller's clock, in seconds."""

    proven: int = 1
    ceiling_until: float | None = None

    def max_in_flight(self, now: float) -> int:
        """The most requests to have in flight: one more than proven, unless such a request waited lately."""
        has_ceiling = self.ceiling_until is not None and now < self.ceiling_until
        return self.proven if has_ceiling else self.proven + 1


def learn_limit(
    limit: ParallelLimit, *, waited_ms: float | None, total_ms: float | None, concurrent: int, now: float
) -> ParallelLimit:
    """The limit after one answer. ``waited_ms`` is the part of ``total_ms`` in which the request waited inside the
    server. Both are the server's own durations, ``None`` if the server gave none.

    ``concurrent`` counts the requests that were in flight on the node when this request was sent, itself included. The
    limit stays the same if the request did not wait and no more requests than proven were in flight.
    """
    if waited_ms is None or total_ms is None:
        return limit
    if waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms):
        # If it waited although no more than proven were in flight, the server was restarted with fewer slots, or other
        # clients use it.
        proven = limit.proven if concurrent > limit.proven else max(limit.proven - 1, 1)
        return ParallelLimit(proven, now + CEILING_S)
    if concurrent > limit.proven:
        return replace(limit, proven=concurrent)
    return limit
