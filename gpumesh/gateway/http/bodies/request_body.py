"""``RequestBody``: a request's body on its way from the parser to the handler."""

from __future__ import annotations

from gpumesh.event_loop.wakeup import Wakeup
from gpumesh.gateway.http.bodies.body_memory import BodyMemory, MemoryReservation


class RequestBody:
    """Holds the bytes of a body that wait for the handler. If the body finds no room in the memory, its bytes are
    dropped, and ``reservation.refused`` is set.

    ``buffered``: the number of waiting bytes. ``complete``: nothing more will come. ``broken``: the body has ended,
    and is not as its head says. ``whole``: the body has ended, and is as its head says.
    """

    __slots__ = ("_changed", "_pieces", "broken", "buffered", "complete", "reservation", "whole")

    def __init__(self, memory: BodyMemory) -> None:
        self.reservation = MemoryReservation(memory)
        self.buffered = 0
        self.complete = False
        self.broken = False
        self.whole = False
        self._pieces: list[bytes] = []  # what the handler has not taken yet
        self._changed: Wakeup | None = None  # exists once the handler has waited: most bodies come at once

    def __repr__(self) -> str:
        state = "complete" if self.complete else "coming"
        if self.broken:
            state = "broken"
        return f"<RequestBody {state}, {self.buffered} bytes buffered>"

    def feed(self, data: bytes) -> int:
        """Adds a piece, and returns how many bytes wait for the handler now."""
        if self.reservation.reserve(len(data)):
            self._pieces.append(data)
            self.buffered += len(data)
        else:
            self._drop_pieces()
        if self._changed is not None:
            self._changed.wake()
        return self.buffered

    def end(self, *, broken: bool = False) -> None:
        """Marks the body as complete, and as ``broken`` if it is not as its head says."""
        self.complete = True
        if broken:
            self.broken = True
        self.whole = not self.broken
        self.wake()

    def take(self) -> bytes:
        """Removes and returns all waiting bytes. Their memory stays reserved."""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._drop_pieces()
        return data

    def release(self) -> None:
        """Frees the body's memory, because the request has ended or will never be served."""
        self.reservation.release()
        if self._pieces:
            self._drop_pieces()

    async def wait_for_change(self) -> None:
        """Returns when more of the body has come, when the body has ended, or when it has lost its memory."""
        if self._changed is None:
            self._changed = Wakeup()
        await self._changed.wait()

    def wake(self) -> None:
        """Lets ``wait_for_change`` return."""
        if self._changed is not None:
            self._changed.wake()

    def _drop_pieces(self) -> None:
        """Forgets the waiting bytes."""
        self._pieces.clear()
        self.buffered = 0
