"""The memory that the bodies of all requests may take together, and which request holds how much of it.

The bytes that are really held are counted: each byte from the moment at which it was read from its connection until
its request has ended, also while the request waits in a queue or is sent a second time. So no client reserves memory
by announcing a body that never comes. A body that finds no room is refused at once, and what it held becomes free. So
bodies never wait for each other: of any number that together fill the memory, some get through. And no client can lock
the others out:

- the last eighth is for bodies of up to a megabyte, as nearly all are;
- while there is no room, a body that has been arriving for longer than ``patience_s`` loses its memory, the oldest
  first.
"""

from __future__ import annotations

from collections.abc import Callable

from gpumesh.errors import QueueFull

SMALL_BODY_BYTES = 1 << 20
RETRY_AFTER_S = 5.0


class BodyMemory:
    """``total`` and ``held`` are bytes. ``reading_since``: the bodies that are being read, and since when, the oldest
    first. ``clock`` gives seconds."""

    def __init__(self, total: int, *, patience_s: float, clock: Callable[[], float]) -> None:
        self.total = total
        self.held = 0
        self.large_body_bytes = total - total // 8
        self.reading_since: dict[MemoryReservation, float] = {}
        self.clock = clock
        self._patience_s = patience_s

    def __repr__(self) -> str:
        return f"<BodyMemory {self.held >> 20} of {self.total >> 20} MiB, {len(self.reading_since)} being read>"

    @property
    def max_body_bytes(self) -> int:
        """A larger body never finds room."""
        return max(self.large_body_bytes, min(SMALL_BODY_BYTES, self.total))

    def has_room(self, held: int, size: int) -> bool:
        """For ``size`` bytes more of a body that holds ``held`` bytes."""
        return self.held + size <= (self.total if held + size <= SMALL_BODY_BYTES else self.large_body_bytes)

    def revoke_slow_bodies(self, reservation: MemoryReservation, size: int) -> bool:
        """Makes room for ``size`` bytes more of ``reservation`` at the cost of bodies that have been arriving for too
        long. Says whether there is room now."""
        latest_start = self.clock() - self._patience_s
        while not self.has_room(reservation.size, size):
            oldest = next(iter(self.reading_since), None)
            if oldest is None or oldest is reservation or self.reading_since[oldest] > latest_start:
                return False
            oldest.revoke()
        return True

    def build_full_error(self) -> QueueFull:
        return QueueFull(
            f"the bodies of other requests take up what gateway.body_memory_mib allows ({self.total >> 20} MiB)",
            retry_after_s=RETRY_AFTER_S,
        )


class MemoryReservation:
    """What one request holds: ``size`` bytes. ``refused``: there was no room for all of its body, and it holds nothing.
    ``released``: the request has ended."""

    __slots__ = ("_memory", "_on_lost", "refused", "released", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._on_lost: Callable[[], None] | None = None
        self.size = 0
        self.refused = False
        self.released = False

    def __repr__(self) -> str:
        state = "refused" if self.refused else "released" if self.released else "held"
        return f"<MemoryReservation {self.size} bytes {state}>"

    def reserve(self, size: int) -> bool:
        """Whether there is room for so many bytes more. If not, all that was held becomes free."""
        memory = self._memory
        if self.refused or self.released:
            return False
        held = self.size + size
        # The same as ``has_room``, without its call: each request passes here.
        if memory.held + size > (memory.total if held <= SMALL_BODY_BYTES else memory.large_body_bytes):
            if not memory.revoke_slow_bodies(self, size):
                self.revoke()
                return False
            held = self.size + size
        self.size = held
        memory.held += size
        return True

    def can_reserve(self, body_size: int) -> bool:
        """Whether there is room now for a body of that size. Nothing is reserved."""
        more = max(body_size - self.size, 0)
        return self._memory.has_room(self.size, more) or self._memory.revoke_slow_bodies(self, more)

    def try_reserve(self, size: int) -> bool:
        """As ``reserve``, but what is held stays where there is no room."""
        if self.refused or self.released or not self._memory.has_room(self.size, size):
            return False
        self.size += size
        self._memory.held += size
        return True

    def release_bytes(self, size: int) -> None:
        """So many bytes of what is held become free."""
        size = min(size, self.size)
        self.size -= size
        self._memory.held -= size

    def start_reading(self, on_lost: Callable[[], None]) -> None:
        """Until ``finish_reading`` others may take its memory; then ``on_lost`` is called."""
        self._on_lost = on_lost
        self._memory.reading_since[self] = self._memory.clock()

    def finish_reading(self) -> None:
        """The body is complete. Harmless when it was not being read."""
        self._on_lost = None
        self._memory.reading_since.pop(self, None)

    def revoke(self) -> None:
        """All that is held becomes free, and no more will be reserved."""
        self.refused = True
        on_lost = self._on_lost
        self.finish_reading()
        self.release_bytes(self.size)
        if on_lost is not None:
            on_lost()

    def release(self) -> None:
        """The request has ended. Harmless when done twice."""
        self.released = True
        if self._on_lost is not None:
            self.finish_reading()
        self._memory.held -= self.size
        self.size = 0
