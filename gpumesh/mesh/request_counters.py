"""Counts the requests that a mesh has accepted, and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from gpumesh.balancer.outcomes import Outcome, RequestOutcome, request_outcome


@dataclass(slots=True)
class RequestCounters:
    """Counts requests. Every accepted request is counted again at its end, in exactly one of ``served``, ``failed`` and
    ``cancelled``. ``on_end`` is called after each end."""

    accepted: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0
    on_end: Callable[[], None] = lambda: None

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
        self.on_end()

    def count_error(self, error: BaseException) -> None:
        """Counts a request that has ended with an error instead of an answer: no node has answered, or the caller does
        not want the answer any more."""
        self.count_end(Outcome.CLIENT_GONE if isinstance(error, asyncio.CancelledError) else Outcome.UNREACHABLE)
