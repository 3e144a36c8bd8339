"""How many requests a node truly runs in parallel, learned from the server's own durations. Pure.

Ollama never answers 503 because a GPU is busy: requests past ``OLLAMA_NUM_PARALLEL`` wait inside it, unseen. But its
final frame gives durations, and ``total - load - prompt_eval - eval`` is the time that the request waited inside
(docs/internals/ollama.md, "Queueing"). So one request more than proven is sent whenever more wait than slots are free.
If that request waited inside the server, the proven number is the limit. If not, the proven number grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# On an idle server the time that no duration covers stays below this.
NOISE_MS = 50.0
NOISE_SHARE = 0.05
CEILING_S = 300.0


@dataclass(frozen=True, slots=True)
class ParallelLimit:
    """``proven``: so many requests ran together without waiting. ``ceiling_until``: until then no more are sent."""

    proven: int = 1
    ceiling_until: float | None = None

    def max_in_flight(self, now: float) -> int:
        """How many requests to send at most: one more than proven, unless that one was tried lately and waited."""
        return self.proven if self.ceiling_until is not None and now < self.ceiling_until else self.proven + 1


def learn_limit(
    limit: ParallelLimit, *, waited_ms: float | None, total_ms: float | None, concurrent: int, now: float
) -> ParallelLimit:
    """The limit after one answer, learned from the server's own durations; ``None`` where it gave none.

    ``waited_ms`` is the part of ``total_ms`` in which the request waited inside the server. ``concurrent`` counts the
    requests that were in flight on the node when this one was sent, itself included. Nothing is learned from an answer
    that did not wait and ran with no more others than proven.
    """
    if waited_ms is None or total_ms is None:
        return limit
    if waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms):
        # It may have waited although no more were sent than proven: then the server was restarted with fewer slots, or
        # other clients use it.
        proven = limit.proven if concurrent > limit.proven else max(limit.proven - 1, 1)
        return ParallelLimit(proven, now + CEILING_S)
    if concurrent > limit.proven:
        return replace(limit, proven=concurrent)
    return limit
