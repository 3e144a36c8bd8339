"""Counts the requests that a mesh has accepted, and their ends."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.balancer.outcomes import Outcome, RequestOutcome, request_outcome


@dataclass(slots=True)
class RequestCounters:
    """Counts requests. Every accepted request is counted again at its end, in exactly one of ``served``, ``failed`` and
    ``cancelled``."""

    accepted: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def in_flight(self) -> int:
        return self.accepted - self.served - self.failed - self.cancelled

    def count_end(self, outcome: Outcome) -> None:
        """Counts a request that has ended. ``outcome`` is the outcome of its last attempt."""
        match request_outcome(outcome):
            case RequestOutcome.SERVED:
                self.served += 1
            case RequestOutcome.CANCELLED:
                self.cancelled += 1
            case _:
                self.failed += 1
