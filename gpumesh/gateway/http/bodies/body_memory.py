"""Limits the memory that the bodies of all requests may take together, and counts how much each request holds.

Only bytes that have arrived are counted. A byte counts from the moment when it is read from its connection until its
request has ended, also while the request waits in a queue or is sent a second time. So a client cannot reserve memory
by announcing a body that never comes. A body that finds no room is refused at once, and its bytes become free. So
bodies never wait for each other: even when they fill the memory together, some of them are received whole. No client
can lock the others out:

- the last eighth of the memory is for bodies of up to a megabyte (nearly all bodies are that small);
- while there is no room, a body that has been arriving for longer than ``patience_s`` loses its memory, the oldest
  first.
"""

from __future__ import annotations

from collections.abc import Callable

from gpumesh.errors import QueueFull

SMALL_BODY_BYTES = 1 << 20  # a body of up to this size is small
RETRY_AFTER_S = 5.0  # when a client whose body found no room may try again


class BodyMemory:
    """The memory for the bodies of all requests: ``held`` of its ``total`` bytes are taken. ``large_body_bytes``: the
    part of the memory that large bodies may use. ``max_body_bytes``: the largest body that can find room at all.
    ``reading_since``: the bodies that are being read, with the time when
    reading started, the oldest first. ``clock`` returns seconds."""

    def __init__(self, total: int, *, patience_s: float, clock: Callable[[], float]) -> None:
        self.resize(total)
        self.held = 0
        self.reading_since: dict[MemoryReservation, float] = {}
        self.clock = clock
        self._patience_s = patience_s

    def resize(self, total: int) -> None:
        """Changes the size to ``total`` bytes. What is held stays, even if it is more than that."""
        self.total = total
        self.large_body_bytes = total - total // 8
        self.max_body_bytes = max(self.large_body_bytes, min(SMALL_BODY_BYTES, total))

    def __repr__(self) -> str:
        return f"<BodyMemory {self.held >> 20} of {self.total >> 20} MiB, {len(self.reading_since)} being read>"

    def has_room(self, held: int, size: int) -> bool:
        """Whether there is room for ``size`` bytes more of a body that holds ``held`` bytes already."""
        limit = self.total if held + size <= SMALL_BODY_BYTES else self.large_body_bytes
        return self.held + size <= limit

    def revoke_slow_bodies(self, reservation: MemoryReservation, size: int) -> bool:
        """Makes room for ``size`` bytes more of ``reservation`` by revoking bodies that have been arriving for too
        long. Returns whether there is room now."""
        latest_start = self.clock() - self._patience_s
        while not self.has_room(reservation.size, size):
            oldest = next(iter(self.reading_since), None)
            # Nothing to revoke: no body is being read, the oldest is this body itself, or even the oldest has not been
            # arriving for too long.
            if oldest is None or oldest is reservation or self.reading_since[oldest] > latest_start:
                return False
            oldest.revoke()
        return True

    def build_full_error(self) -> QueueFull:
        """The error for a request whose body finds no room."""
        return QueueFull(
            f"the bodies of other requests take up what gateway.body_memory_mib allows ({self.total >> 20} MiB)",
            retry_after_s=RETRY_AFTER_S,
        )


class MemoryReservation:
    """The memory that one request holds: ``size`` bytes. ``refused``: there was no room for the whole body, so the
    request holds nothing. ``released``: the request has ended."""

    __slots__ = ("_memory", "_on_lost", "refused", "released", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._on_lost: Callable[[], None] | None = None  # called if the memory is taken away
        self.size = 0
        self.refused = False
        self.released = False

    def __repr__(self) -> str:
        state = "released" if self.released else "held"
        if self.refused:
            state = "refused"
        return f"<MemoryReservation {self.size} bytes {state}>"

    def reserve(self, size: int) -> bool:
        """Reserves ``size`` bytes more, and returns ``True``. Without room it returns ``False``, and frees all bytes of
        the request."""
        memory = self._memory
        if self.refused or self.released:
            return False
        new_size = self.size + size
        # ``has_room``, written out here: every request passes here, and the call would cost time.
        limit = memory.total if new_size <= SMALL_BODY_BYTES else memory.large_body_bytes
        if memory.held + size > limit and not memory.revoke_slow_bodies(self, size):
            self.revoke()
            return False
        self.size = new_size
        memory.held += size
        return True

    def can_reserve(self, body_size: int) -> bool:
        """Whether there is room now for a body of ``body_size`` bytes. May revoke slow bodies, but reserves nothing."""
        missing = max(body_size - self.size, 0)
        return self._memory.has_room(self.size, missing) or self._memory.revoke_slow_bodies(self, missing)

    def try_reserve(self, size: int) -> bool:
        """Reserves ``size`` bytes more, and returns whether there was room. Without room the request keeps the bytes
        that it holds. Unlike ``reserve``, this revokes no other body."""
        if self.refused or self.released or not self._memory.has_room(self.size, size):
            return False
        self.size += size
        self._memory.held += size
        return True

    def release_bytes(self, size: int) -> None:
        """Frees ``size`` of the bytes that the request holds."""
        size = min(size, self.size)
        self.size -= size
        self._memory.held -= size

    def start_reading(self, on_lost: Callable[[], None]) -> None:
        """Notes that the body is being read from now on. Until ``finish_reading``, other requests may take its memory;
        when they do, ``on_lost`` is called."""
        self._on_lost = on_lost
        self._memory.reading_since[self] = self._memory.clock()

    def finish_reading(self) -> None:
        """Notes that the body is complete: no other request may take its memory any more. Does nothing if the body was
        not being read."""
        self._on_lost = None
        self._memory.reading_since.pop(self, None)

    def revoke(self) -> None:
        """Frees all bytes that the request holds. From now on the request cannot reserve any."""
        self.refused = True
        on_lost = self._on_lost
        self.finish_reading()
        self.release_bytes(self.size)
        if on_lost is not None:
            on_lost()

    def release(self) -> None:
        """Frees all bytes, because the request has ended. A second call does nothing."""
        self.released = True
        if self._on_lost is not None:
            self.finish_reading()
        self._memory.held -= self.size
        self.size = 0
