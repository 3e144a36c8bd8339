"""The queue of requests that wait for a slot: by priority, with ageing, so that no request starves. Pure.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority

T = TypeVar("T")

# A request of this class ranks as if it had come so many seconds later than it did. So no request waits for ever: those
# of higher classes that come after this time rank behind it.
PRIORITY_DELAY_S = {Priority.INTERACTIVE: 0.0, Priority.NORMAL: 10.0, Priority.BATCH: 60.0}


@dataclass(frozen=True, slots=True)
class QueueEntry(Generic[T]):
    """``queued_at`` may lie before the time at which the entry was added: a request that a node failed keeps its
    rank."""

    payload: T
    priority: Priority
    queued_at: float
    sequence: int

    @property
    def rank(self) -> tuple[float, int]:
        """The entry with the smallest rank is served first. A rank stays the same while the request waits, because all
        requests age alike."""
        return (self.queued_at + PRIORITY_DELAY_S[self.priority], self.sequence)


@dataclass(slots=True)
class WaitQueue(Generic[T]):
    """Bounded. Iterates in the order of service; any entry may be discarded at any time. ``entries`` has
    no order."""

    max_size: int
    entries: dict[int, QueueEntry[T]] = field(default_factory=dict)
    _next_sequence: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= self.max_size

    def add(self, payload: T, priority: Priority, queued_at: float, *, bounded: bool = True) -> QueueEntry[T]:
        """Raises ``OverflowError`` when the queue is full. ``bounded`` is false for a request that has begun already:
        it is added even to a full queue."""
        if bounded and self.is_full:
            raise OverflowError(f"{self.max_size} requests wait already")
        entry = QueueEntry(payload, priority, queued_at, self._next_sequence)
        self._next_sequence += 1
        self.entries[entry.sequence] = entry
        return entry

    def discard(self, entry: QueueEntry[T]) -> None:
        """Removes the entry if it is still in the queue."""
        self.entries.pop(entry.sequence, None)

    def __iter__(self) -> Iterator[QueueEntry[T]]:
        return iter(sorted(self.entries.values(), key=lambda entry: entry.rank))

    def position(self, entry: QueueEntry[T]) -> int:
        """The number of requests that are served before this one."""
        return sum(other.rank < entry.rank for other in self.entries.values())
