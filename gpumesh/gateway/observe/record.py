"""What happened to one request, gathered as it goes: the access log and the metrics are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.mesh.requests.answer import Answer


class RequestOutcome(StrEnum):
    """How a request ended. ``REFUSED``: it was the client's mistake and no node was asked."""

    SERVED = "served"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


@dataclass(slots=True, eq=False)
class RequestRecord:
    """``started_at``, ``first_byte_at`` and ``ended_at`` are seconds of ``clock``; ``first_byte_at`` is when the
    answer's first bytes were in hand, ``node`` where it began: the answer's own may be another one, if it was
    continued. ``route`` is one of a fixed set of names, whatever the path was. ``status`` 0: nothing was sent."""

    clock: Callable[[], float]
    started_at: float
    method: str
    path: str
    route: str = ""
    demand: Demand | None = None
    answer: Answer | None = None
    node: str | None = None
    first_byte_at: float | None = None
    ended_at: float = 0.0
    status: int = 0
    sent_bytes: int = 0
    outcome: RequestOutcome | None = None

    def note_answer(self, answer: Answer) -> None:
        """A node's answer has begun."""
        self.answer = answer
        self.node = answer.node
        self.first_byte_at = self.clock()


def request_outcome(outcome: Outcome | None) -> RequestOutcome:
    """``None``: a whole answer, which was complete before anybody saw it."""
    if outcome in (None, Outcome.SERVED, Outcome.CLIENT_ERROR):
        return RequestOutcome.SERVED
    return RequestOutcome.CANCELLED if outcome is Outcome.CLIENT_GONE else RequestOutcome.FAILED
