"""The queue of requests that wait for a slot: by priority, with ageing, so that no request starves. Pure.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority

T = TypeVar("T")

# A request of this class ranks as if it had come so many seconds later than it did. So no request waits for ever: after
# this time, even a new request of a higher class ranks behind it.
PRIORITY_DELAY_S = {Priority.INTERACTIVE: 0.0, Priority.NORMAL: 10.0, Priority.BATCH: 60.0}


@dataclass(frozen=True, slots=True)
class QueueEntry(Generic[T]):
    """A request in the queue. ``payload`` is the caller's own object for it, and ``sequence`` its number in the order
    of additions. ``queued_at`` may lie before the addition: a request that a node failed keeps its rank."""

    payload: T
    priority: Priority
    queued_at: float
    sequence: int

    @property
    def rank(self) -> tuple[float, int]:
        """The entry's place in the order of service, the smallest rank first: the time of queueing plus the delay of
        the priority, then the sequence. It stays the same while the request waits, because all requests age alike."""
        return (self.queued_at + PRIORITY_DELAY_S[self.priority], self.sequence)


@dataclass(slots=True)
class WaitQueue(Generic[T]):
    """A queue of at most ``max_size`` entries. Iterating over it yields the entries in the order in which they are
    served; ``entries`` are not sorted. Any entry may be discarded at any time."""

    max_size: int
    entries: dict[int, QueueEntry[T]] = field(default_factory=dict)
    _next_sequence: int = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= self.max_size

    def add(self, payload: T, priority: Priority, queued_at: float, *, bounded: bool = True) -> QueueEntry[T]:
        """Adds a request and returns its entry. Raises ``OverflowError`` when the queue is full, unless ``bounded`` is
        false: a request that was accepted before is added even to a full queue."""
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
