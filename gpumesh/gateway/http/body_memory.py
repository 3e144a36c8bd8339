"""The memory that the bodies of all requests may take together, and who holds how much of it.

Counted is what is really held: each byte from the moment at which it was read from its connection, in the queue and on
its way to a second node as well, until its request has ended. So nobody reserves what never comes by announcing it. A
body that finds no room is refused at once and what it held is free, so that bodies never wait for each other: of any
number that together fill the memory some get through. And nobody can lock the others out:

- the last eighth is for bodies of up to a megabyte, which nearly all are;
- while there is no room, a body that has been coming for longer than ``patience_s`` loses its own, the oldest first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gpumesh.errors import QueueFull

T = TypeVar("T")

SMALL_BODY_BYTES = 1 << 20
RETRY_AFTER_S = 5.0


class BodyMemory:
    """``total`` and ``held`` are bytes; ``reading_since``: the bodies that are being read, and since when; ``clock``
    gives seconds."""

    def __init__(self, total: int, *, patience_s: float, clock: Callable[[], float]) -> None:
        self.total = total
        self.held = 0
        self.large_body_bytes = total - total // 8
        self.reading_since: dict[MemoryReservation, float] = {}
        self.clock = clock
        self._patience_s = patience_s

    def __repr__(self) -> str:
        return f"<BodyMemory {self.held >> 20} of {self.total >> 20} MiB, {len(self.reading_since)} coming>"

    @property
    def max_body_bytes(self) -> int:
        """Of one body: what is larger finds no room ever."""
        return max(self.large_body_bytes, min(SMALL_BODY_BYTES, self.total))

    def has_room(self, held: int, size: int) -> bool:
        """For ``size`` bytes more of a body of which ``held`` are here."""
        return self.held + size <= (self.total if held + size <= SMALL_BODY_BYTES else self.large_body_bytes)

    def revoke_slow_bodies(self, share: MemoryReservation, size: int) -> bool:
        """Takes it from those that have been coming for too long, as far as that helps."""
        since = self.clock() - self._patience_s
        while not self.has_room(share.size, size):
            oldest = next(iter(self.reading_since), None)
            if oldest is None or oldest is share or self.reading_since[oldest] > since:
                return False
            oldest.revoke()
        return True

    def build_full_error(self) -> QueueFull:
        return QueueFull(
            f"the bodies of other requests take up what gateway.body_memory_mib allows ({self.total >> 20} MiB)",
            retry_after_s=RETRY_AFTER_S,
        )


class MemoryReservation:
    """What one request holds: ``size`` bytes. ``refused``: there was no room for all of it, and it holds none."""

    __slots__ = ("_memory", "_on_lost", "refused", "released", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._on_lost: Callable[[], None] | None = None
        self.size = 0
        self.refused = False
        self.released = False

    def reserve(self, size: int) -> bool:
        """Whether there is room for so many bytes more; if not, or after its end, all that it held is free."""
        memory = self._memory
        if self.refused or self.released:
            return False
        held = self.size + size
        # As ``has_room`` has it; each request passes here.
        if memory.held + size > (memory.total if held <= SMALL_BODY_BYTES else memory.large_body_bytes):
            if not memory.revoke_slow_bodies(self, size):
                self.revoke()
                return False
            held = self.size + size
        self.size = held
        memory.held += size
        return True

    def can_reserve(self, whole: int) -> bool:
        """Whether there is room now for a body of that size; nothing is reserved by asking."""
        more = max(whole - self.size, 0)
        return self._memory.has_room(self.size, more) or self._memory.revoke_slow_bodies(self, more)

    def try_reserve(self, size: int) -> bool:
        """The same, but what it has is kept."""
        if self.refused or self.released or not self._memory.has_room(self.size, size):
            return False
        self.size += size
        self._memory.held += size
        return True

    def release_bytes(self, size: int) -> None:
        """Of what it holds; nothing once that is free."""
        size = min(size, self.size)
        self.size -= size
        self._memory.held -= size

    def start_reading(self, on_lost: Callable[[], None]) -> None:
        """From now until ``finish_reading`` it may lose its room to others."""
        self._on_lost = on_lost
        self._memory.reading_since[self] = self._memory.clock()

    def finish_reading(self) -> None:
        self._on_lost = None
        self._memory.reading_since.pop(self, None)

    def revoke(self) -> None:
        self.refused = True
        on_lost = self._on_lost
        self.finish_reading()
        self.release_bytes(self.size)
        if on_lost is not None:
            on_lost()

    def release(self) -> None:
        """Its request has ended. Harmless when done twice."""
        self.released = True
        if self._on_lost is not None:
            self.finish_reading()
        self._memory.held -= self.size
        self.size = 0
