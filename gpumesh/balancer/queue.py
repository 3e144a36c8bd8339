"""What waits for a place, by priority with ageing, so that nothing starves. Pure; the caller's clock in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority

T = TypeVar("T")

# A request of a lower class overtakes one of a higher class that came so many seconds later.
HEAD_START_S = {Priority.INTERACTIVE: 0.0, Priority.NORMAL: 10.0, Priority.BATCH: 60.0}


@dataclass(frozen=True, slots=True)
class QueueEntry(Generic[T]):
    payload: T
    priority: Priority
    queued_at: float
    sequence: int

    @property
    def rank(self) -> tuple[float, int]:
        """Smaller goes first. It does not change while waiting, so ageing costs nothing: all age alike."""
        return (self.queued_at + HEAD_START_S[self.priority], self.sequence)


@dataclass(slots=True)
class WaitQueue(Generic[T]):
    """Bounded. Iterates in the order of service; removal of any item is allowed at any time."""

    max_size: int
    _items: dict[int, QueueEntry[T]] = field(default_factory=dict)
    _next: int = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        return len(self._items) >= self.max_size

    def add(self, item: T, priority: Priority, now: float, *, bounded: bool = True) -> QueueEntry[T]:
        """Raises ``OverflowError`` at the bound. What was begun already is not turned away by it: ``bounded`` false."""
        if bounded and self.is_full:
            raise OverflowError(f"{self.max_size} requests wait already")
        waiting = QueueEntry(item, priority, now, self._next)
        self._next += 1
        self._items[waiting.sequence] = waiting
        return waiting

    def discard(self, waiting: QueueEntry[T]) -> None:
        self._items.pop(waiting.sequence, None)

    def __iter__(self) -> Iterator[QueueEntry[T]]:
        return iter(sorted(self._items.values(), key=lambda waiting: waiting.rank))

    def position(self, waiting: QueueEntry[T]) -> int:
        """0 is next."""
        return sum(other.rank < waiting.rank for other in self._items.values())
