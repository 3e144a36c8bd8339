"""``RequestRecord``: what happened to one request, collected while it runs. The access log and the metrics are made of
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import RequestOutcome, request_outcome
from gpumesh.mesh.requests.answer import Answer


@dataclass(slots=True, eq=False)
class RequestRecord:
    """``started_at``, ``first_byte_at`` and ``ended_at`` are seconds of ``clock``. ``first_byte_at`` is when the
    answer's first bytes had come, ``node`` where the answer began: ``answer.node`` is another one after a continuation.
    ``route`` is one of a fixed set of names, whatever the path was. ``status`` 0: nothing was sent."""

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

    def note_end(self, *, status: int, sent_bytes: int) -> None:
        """A reply was sent. Where no outcome was set, it is that of the node's answer; without one the gateway itself
        has served the request."""
        self.ended_at = self.clock()
        self.status = status
        self.sent_bytes = sent_bytes
        if self.outcome is None:
            answer = None if self.answer is None else self.answer.outcome
            self.outcome = RequestOutcome.SERVED if answer is None else request_outcome(answer)

    def note_client_gone(self, *, status: int, sent_bytes: int) -> None:
        """There was nobody any more to reply to."""
        self.outcome = RequestOutcome.CANCELLED
        self.note_end(status=status, sent_bytes=sent_bytes)
