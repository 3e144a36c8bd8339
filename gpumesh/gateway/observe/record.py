"""``RequestRecord``: the facts about one request, collected while it runs. The access log and the metrics use them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import RequestOutcome, request_outcome
from gpumesh.mesh.requests.answer import Answer, SendProgress


class RequestRecord(msgspec.Struct, eq=False):
    """The facts about one request. A field is ``None`` until its fact is known.

    - ``started_at``, ``first_byte_at``, ``ended_at``: seconds of ``clock``. ``first_byte_at`` is the time at which the
      answer's first bytes had come.
    - ``node``: the node where the answer began. After a continuation ``answer.node`` is another node. If there is no
      answer, it is the node that got the request last.
    - ``progress``: how far the sending of the request has come.
    - ``route``: one of a fixed set of names, whatever the path was.
    - ``status``: the HTTP status; 0 if nothing was sent. ``body_bytes``: the size of the request's body.
    - ``cancel_reason``: set when a person cancels the request: the message for the client.
    """

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
    body_bytes: int = 0
    outcome: RequestOutcome | None = None
    cancel_reason: str | None = None
    progress: SendProgress = msgspec.field(default_factory=SendProgress)

    def note_answer(self, answer: Answer) -> None:
        """Notes that a node's answer has begun, now."""
        self.answer = answer
        self.node = answer.node
        self.first_byte_at = self.clock()

    def note_end(self, *, status: int, sent_bytes: int, reported_failure: bool = False) -> None:
        """Notes that the request has ended, now. ``reported_failure``: the reply's stream has reported a failure to
        the client, although the reply's status, which was sent before, is that of a success.

        If no outcome was set before, the outcome follows from the node's answer. If no node answered either, the reply
        is the gateway's own, and the outcome follows from the reply."""
        if self.node is None:
            self.node = self.progress.node
        self.ended_at = self.clock()
        self.status = status
        self.sent_bytes = sent_bytes
        if self.outcome is None:
            last_outcome = None if self.answer is None else self.answer.outcome
            if last_outcome is not None:
                self.outcome = request_outcome(last_outcome)
            elif reported_failure or status >= 500:
                self.outcome = RequestOutcome.FAILED
            else:
                self.outcome = RequestOutcome.SERVED

    def note_client_gone(self, *, status: int, sent_bytes: int) -> None:
        """Notes that the client left before its reply was complete."""
        self.outcome = RequestOutcome.CANCELLED
        self.note_end(status=status, sent_bytes=sent_bytes)
