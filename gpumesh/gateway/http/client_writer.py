"""``ClientWriter`` writes to one client, with back-pressure, and cuts off a client that reads too slowly."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable

from gpumesh.event_loop.turn_writes import TurnWrites
from gpumesh.gateway.http.bounds import Bounds


class ClientWriter:
    """Writes to a transport. A client that takes less than ``Bounds.min_bytes_per_s`` over ``Bounds.write_timeout_s``
    is cut off. ``backpressured``: the client reads more slowly than the answer is written. ``on_writable`` is called
    when the back-pressure ends, and when the client is gone. ``on_backpressure`` is called with each new value of
    ``backpressured``. ``transport`` is ``None`` once the client is gone. The small pieces of one turn of the event loop
    go to the transport together (turn_writes.py); call ``flush`` before the transport is closed."""

    __slots__ = (
        "_finished",
        "_loop",
        "_progress_timer",
        "_waiter",
        "backpressured",
        "bounds",
        "on_backpressure",
        "on_writable",
        "transport",
        "turn_writes",
    )

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, bounds: Bounds, turn_writes: TurnWrites
    ) -> None:
        self.bounds = bounds
        self.turn_writes = turn_writes
        self.backpressured = False
        self.on_writable: Callable[[], None] | None = None
        self.on_backpressure: Callable[[bool], None] | None = None
        self.transport: asyncio.Transport | None = transport
        self._loop = loop
        self._finished = False  # the answer is written wholly
        self._waiter: asyncio.Future[None] | None = None  # of the handler that waits for room
        self._progress_timer: asyncio.TimerHandle | None = None  # runs while the client must take bytes

    def __repr__(self) -> str:
        state = "backpressured" if self.backpressured else "writable"
        if self.transport is None:
            state = "closed"
        return f"<ClientWriter {state}, {self.unsent_bytes} bytes unsent>"

    def write(self, data: bytes) -> None:
        """Writes these bytes, at the end of this turn if they are few. Raises ConnectionResetError when the client is
        gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if data:
            self.turn_writes.write(transport, data)

    def flush(self) -> None:
        """Passes the bytes that this turn has written to the transport. Drops them if the client is gone."""
        if self.transport is not None:
            self.turn_writes.flush(self.transport)

    async def wait_writable(self) -> None:
        """Returns when the client has taken most of the written bytes. Raises ConnectionResetError when the client is
        gone."""
        if not self.backpressured:
            return
        if self.transport is None:
            raise ConnectionResetError("the client is gone")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def unsent_bytes(self) -> int:
        """The number of written bytes that the kernel has not taken yet."""
        transport = self.transport
        if transport is None:
            return 0
        return self.turn_writes.count_held(transport) + transport.get_write_buffer_size()

    @property
    def unacknowledged_bytes(self) -> int | None:
        """The number of written bytes that the client's system has not acknowledged yet; ``None`` if it is not
        known."""
        if self.transport is None:
            return 0
        in_kernel = _bytes_in_kernel(self.transport)
        return None if in_kernel is None else self.unsent_bytes + in_kernel

    # -- called by the connection ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Begins the back-pressure: the transport's buffer is full."""
        self.backpressured = True
        if self.on_backpressure is not None:
            self.on_backpressure(True)
        self.watch_progress()

    def resume(self) -> None:
        """Ends the back-pressure: the client has taken most of the transport's buffer."""
        self.backpressured = False
        if self.on_backpressure is not None:
            self.on_backpressure(False)
        if self._progress_timer is not None and not self._finished:
            self._progress_timer.cancel()
            self._progress_timer = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.on_writable is not None:
            self.on_writable()

    def finish(self) -> None:
        """Notes that nothing more will be written. The unsent bytes must still go out, so their progress is watched
        even without back-pressure."""
        self._finished = True
        self.watch_progress()

    def connection_lost(self) -> None:
        """Notes that the connection is gone, and wakes the source of the answer and the task that waits to write."""
        self.transport = None
        if self._progress_timer is not None:
            self._progress_timer.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError("the client is gone"))
            # Marks the exception as retrieved: asyncio would log it if the waiting task was cancelled.
            self._waiter.exception()
        if self.on_writable is not None:
            self.on_writable()  # tells the source of the answer: from now on a write raises ConnectionResetError
            self.on_writable = None

    def watch_progress(self) -> None:
        """Starts to check at intervals whether the client takes the unsent bytes. Does nothing without unsent bytes."""
        if self._progress_timer is None and self.unsent_bytes:
            self._progress_timer = self._loop.call_later(
                self.bounds.write_timeout_s, self._check_progress, self._count_remaining_bytes()
            )

    def _check_progress(self, remaining_before: int) -> None:
        """Cuts off a client that has taken too few bytes since ``remaining_before`` bytes remained. A large answer may
        take as long as it needs, if it moves fast enough."""
        self._progress_timer = None
        if self.transport is None or not self.unsent_bytes:
            return
        taken = remaining_before - self._count_remaining_bytes()
        if taken < self.bounds.min_bytes_per_s * self.bounds.write_timeout_s:
            self.transport.abort()
        else:
            self.watch_progress()

    def _count_remaining_bytes(self) -> int:
        """The number of written bytes that the client has not taken, as far as the system tells."""
        # ``None``: the system tells only the unsent bytes. 0 includes them, so they are 0 too.
        return self.unacknowledged_bytes or self.unsent_bytes


def _bytes_in_kernel(transport: asyncio.Transport) -> int | None:
    """The number of bytes that the kernel has taken and the client has not; ``None`` if the system does not tell it.
    These bytes may be megabytes, and the kernel takes more only when a third of them is gone. So if they were not
    counted, a slow client would look like a client that takes nothing."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:  # the system has no TIOCOUTQ, or the socket is closed
        return None
    return int.from_bytes(answer, sys.byteorder)
