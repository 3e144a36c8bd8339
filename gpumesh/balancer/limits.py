"""How many requests a node truly runs in parallel, learned from the server's own durations. Pure.

Ollama never says 503 to a busy GPU: requests past ``OLLAMA_NUM_PARALLEL`` wait inside it, unseen. But its final frame
gives ``total - load - prompt_eval - eval``, which is the time that the request waited inside (facts/ollama-api.md).
So: offer one more than was proven whenever there is more to do than places; if what ran beside that many others
waited, the proven number is the limit; if not, the proof grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Bookkeeping inside the server that no duration covers stays below this on an idle server.
NOISE_MS = 50.0
NOISE_SHARE = 0.05
CEILING_S = 300.0


@dataclass(frozen=True, slots=True)
class ParallelLimit:
    """``proven``: so many ran together without waiting. ``ceiling_until``: until then no more are offered."""

    proven: int = 1
    ceiling_until: float | None = None

    def max_in_flight(self, now: float) -> int:
        """How many to send at most: one more than proven, unless that was tried lately and waited."""
        return self.proven if self.ceiling_until is not None and now < self.ceiling_until else self.proven + 1


def learn_limit(
    limit: ParallelLimit, *, waited_ms: float | None, total_ms: float | None, concurrent: int, now: float
) -> ParallelLimit:
    """After one answer, from the server's own durations; ``None`` where it gave none.

    ``waited_ms`` is the time that the request waited inside the server, of ``total_ms``. ``concurrent``: the requests
    that were in flight on the node when it was sent, itself included. Only an answer that had company beyond what is
    proven, or waited, teaches anything.
    """
    if waited_ms is None or total_ms is None:
        return limit
    if waited_ms > max(NOISE_MS, NOISE_SHARE * total_ms):
        # It waited though no more were sent than proven: the server was restarted with less, or someone else uses it.
        proven = limit.proven if concurrent > limit.proven else max(limit.proven - 1, 1)
        return ParallelLimit(proven, now + CEILING_S)
    if concurrent > limit.proven:
        return replace(limit, proven=concurrent)
    return limit
