"""``Outbox`` decides when events are sent: at once, but never more than somebody wants to read. Pure.

The first event of a node is sent at once. After it the node is quiet for a time. What happens to it meanwhile is sent
at the end of that time in one message, which says how often something has changed. So a node that comes and goes all
night makes a message in each quiet time, and no more. Of all nodes together there are at most ``MAX_MESSAGES`` in a
quiet time; the events that are left over are sent together at its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.notify.events import MeshEvent
from gpumesh.topology import EventKind

MAX_MESSAGES = 10  # of one rule in a quiet time
MAX_PENDING = 1000  # subjects that wait; a mesh with more loses the oldest of them
# Events that concern the node's health replace each other: only the last says how the node is now.
_HEALTH_KINDS = (EventKind.NODE_DOWN, EventKind.NODE_UP, EventKind.ALL_DOWN)

Subject = tuple[str | None, str]
"""The node (``None``: the mesh) and what the events are about. Only the last event of a subject is told."""


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event that waits, and the number of events of its subject since the last message, this one included."""

    event: MeshEvent
    count: int


class Outbox:
    """The events of one rule. ``quiet_s``: see the module. Times are seconds of the caller's clock."""

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._pending: dict[Subject, PendingEvent] = {}  # what waits to be sent
        self._sent_at: dict[Subject, float] = {}  # when a message about it was sent last
        self._messages: deque[float] = deque()  # when the last messages were sent

    def __repr__(self) -> str:
        return f"<Outbox {len(self._pending)} pending, {len(self._messages)} sent lately>"

    def add(self, event: MeshEvent) -> None:
        """Adds an event that has happened."""
        subject = _subject_of(event)
        before = self._pending.pop(subject, None)  # the newest is the last, also in the order of the message
        self._pending[subject] = PendingEvent(event, 1 if before is None else before.count + 1)
        if len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]

    def take_due(self, now: float) -> Sequence[PendingEvent]:
        """Removes and returns the events that are to be sent now, in one message; none: nothing is to be sent."""
        self._forget_old(now)
        if len(self._messages) >= MAX_MESSAGES:
            return ()
        due = [subject for subject in self._pending if self._is_due(subject, now)]
        if not due:
            return ()
        self._messages.append(now)
        self._sent_at.update(dict.fromkeys(due, now))
        return [self._pending.pop(subject) for subject in due]

    def next_due_s(self, now: float) -> float | None:
        """The seconds until ``take_due`` may return something; ``None``: nothing waits."""
        if not self._pending:
            return None
        first_at = min(self._sent_at.get(subject, now - self._quiet_s) + self._quiet_s for subject in self._pending)
        if len(self._messages) >= MAX_MESSAGES:
            first_at = max(first_at, self._messages[0] + self._quiet_s)
        return max(first_at - now, 0.0)

    def _is_due(self, subject: Subject, now: float) -> bool:
        sent_at = self._sent_at.get(subject)
        return sent_at is None or now - sent_at >= self._quiet_s

    def _forget_old(self, now: float) -> None:
        """Forgets what was sent before the quiet time."""
        while self._messages and now - self._messages[0] >= self._quiet_s:
            self._messages.popleft()
        for subject in [subject for subject, sent_at in self._sent_at.items() if now - sent_at >= self._quiet_s]:
            del self._sent_at[subject]


def _subject_of(event: MeshEvent) -> Subject:
    return event.node, "health" if event.kind in _HEALTH_KINDS else f"{event.kind} {event.subject}"
