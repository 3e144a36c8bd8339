"""Local sockets of a tunnel: one selector thread accepts, reads and writes all of them, whatever carries the bytes.

Why not a thread for each connection, as sshtunnel has it: at 256 streams of 100 tokens/s each chunk would cost several
thread switches, and waiting clients would overflow a listen backlog of 5 (facts: tunnel-latency.md).

A *dial* says where an accepted connection goes: ``relay_to_unix`` (transport openssh: ssh's own forward listens on a
Unix socket) or ``channels.ChannelCarrier.dial`` (transport sshtunnel: a channel on a paramiko transport).

The listening sockets are the supervisor's, shared with each worker in turn. A worker accepts only from ``start`` on,
so while no worker is connected, clients wait in the kernel's queue of ``BACKLOG`` places instead of being refused.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

BACKLOG = 1024
CHUNK_BYTES = 64 * 1024
RETRY_S = 0.005
ACCEPTS_AT_ONCE = 64

Handler = Callable[[int], None]


class Dialer(Protocol):
    """Takes over ``local``, a non-blocking accepted socket, and closes it in the end. Called in the selector's thread,
    so it must not block."""

    def __call__(self, forwarder: Forwarder, local: socket.socket) -> None: ...


class PeerFilter(Protocol):
    """Decides, in the selector's thread, whose connections are served (peer_users.py)."""

    def allows(self, connection: socket.socket, peer: Any) -> bool:
        """``peer`` is the address that ``accept`` gave."""

    def close(self) -> None: ...


class Relay(Protocol):
    """A connection being forwarded."""

    def abort(self) -> None:
        """Close both ends at once, the local one by a reset: a client must not take a cut answer for a whole one."""


class Forwarder:
    """The selector thread and what it watches. ``listen`` before ``start``; ``post`` is for any thread; the methods
    under "in the selector's thread" are for dials and links."""

    def __init__(self, on_end: Callable[[], None] | None = None, *, peer_filter: PeerFilter | None = None) -> None:
        """``on_end`` is called in the selector's thread when its loop has ended, for whatever reason. Connections that
        ``peer_filter`` does not admit are reset; without one all are served."""
        self._on_end = on_end
        self._door = peer_filter
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_out, READ, self._woken)
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._listeners: list[tuple[socket.socket, Dialer]] = []
        self._links: set[Relay] = set()
        self._stopping = False
        self._running = False
        self._turn = threading.Lock()  # between beginning and ending
        self._finished = threading.Event()

    @property
    def connections(self) -> int:
        """How many connections are being forwarded now."""
        return len(self._links)

    def listen(self, listener: socket.socket, dial: Dialer) -> None:
        """Connections to ``listener`` go to ``dial``. The listener stays the caller's: it is never closed here."""
        listener.setblocking(False)
        self._listeners.append((listener, dial))

    def start(self) -> None:
        """Starts accepting, in a thread."""
        threading.Thread(target=self.run, name="forwarder", daemon=True).start()

    def run(self) -> None:
        """The loop itself, for a caller that brings its own thread; returns after ``close``."""
        with self._turn:
            if self._stopping:
                return  # ``close`` came first, and has torn down
            self._running = True
        for listener, dial in self._listeners:
            self._selector.register(listener, READ, lambda _, one=listener, to=dial: self._accept(one, to))
        try:
            while not self._stopping:
                for key, mask in self._selector.select(self._next_timer()):
                    handler: Handler = key.data
                    handler(mask)
                self._run_timers()
                while self._posted:
                    self._posted.popleft()()
        finally:
            self._tear_down()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Ends the loop, resets every connection, and waits: true when that is done. May be called twice and from any
        thread but the selector's."""
        with self._turn:
            never_ran = not self._running and not self._stopping
            self._stopping = True
        if never_ran:
            self._tear_down()
        self._wake()
        return self._finished.wait(timeout_s)

    def post(self, callback: Callable[[], None]) -> None:
        """Runs ``callback`` in the selector's thread, soon; dropped if the loop has ended."""
        self._posted.append(callback)
        self._wake()

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def watch(self, sock: socket.socket, events: int, handler: Handler) -> None:
        """Calls ``handler`` with the events (READ, WRITE) that ``sock`` is ready for; 0 stops that."""
        known = self._selector.get_map().get(sock)
        if known is None:
            if events:
                self._selector.register(sock, events, handler)
        elif not events:
            self._selector.unregister(sock)
        elif known.events != events:
            self._selector.modify(sock, events, handler)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._sequence), callback))

    def add_relay(self, link: Relay) -> None:
        self._links.add(link)

    def discard_relay(self, link: Relay) -> None:
        self._links.discard(link)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, dial: Dialer) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                local, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # Out of file descriptors or memory: the queue would be ready at once again, so look again later.
                self._selector.unregister(listener)
                self.call_later(0.1, lambda: self.watch(listener, READ, lambda _: self._accept(listener, dial)))
                return
            try:
                local.setblocking(False)
                if local.family in (socket.AF_INET, socket.AF_INET6):
                    local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._door is None or self._door.allows(local, peer):
                    dial(self, local)
                else:
                    close_with_reset(local)
            except OSError:  # no descriptor is left for the other side: this connection ends, not all of them
                close_with_reset(local)

    def _woken(self, _: int) -> None:
        try:
            while self._wake_out.recv(4096):
                pass
        except (BlockingIOError, InterruptedError):
            pass

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except (BlockingIOError, InterruptedError):
            pass  # it is already full of wake-ups
        except OSError:
            pass  # closed: the loop has ended

    def _next_timer(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _tear_down(self) -> None:
        for link in list(self._links):
            link.abort()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._posted.clear()
        if self._door is not None:
            self._door.close()
        self._finished.set()
        if self._on_end is not None:
            self._on_end()


def close_with_reset(sock: socket.socket) -> None:
    """Closes so that a TCP peer sees a reset, not an ordinary end."""
    reset_on_close(sock)
    sock.close()


def reset_on_close(sock: socket.socket) -> None:
    """Whoever closes it resets it."""
    with contextlib.suppress(OSError):  # not connected any more
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def relay_to_unix(path: str) -> Dialer:
    """Each connection goes to the Unix socket at ``path``, where an ``ssh`` forwards. Refused there: reset here."""

    def dial(forwarder: Forwarder, local: socket.socket) -> None:
        UnixRelay(forwarder, local, path)

    return dial


class UnixRelay:
    """Bytes both ways between two sockets. One side is read only when what it sent before has been written to the
    other: so a slow reader stops the sender, and at most ``CHUNK_BYTES`` is held in each direction."""

    def __init__(self, forwarder: Forwarder, local: socket.socket, path: str) -> None:
        self._forwarder = forwarder
        self._path = path
        remote = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        remote.setblocking(False)
        self._sockets = (local, remote)
        self._pending = [b"", b""]  # to be written to the socket of the same index
        self._ended = [False, False]  # that socket has sent its last byte
        self._events = [0, 0]
        self._closed = False
        forwarder.add_relay(self)
        self._connect(tries=400)

    def abort(self) -> None:
        self._close(reset=True)

    def _connect(self, tries: int) -> None:
        if self._closed:
            return
        try:
            self._sockets[1].connect(self._path)
        except BlockingIOError:
            # ssh's own listen queue is full; a Unix socket gives no event when there is room again.
            if tries > 0:
                self._forwarder.call_later(RETRY_S, lambda: self._connect(tries - 1))
            else:
                self.abort()
        except OSError:
            self.abort()
        else:
            self._update()

    def _ready(self, side: int, mask: int) -> None:
        if self._closed:
            return  # by the other side's event, in the same turn of the loop
        try:
            if mask & WRITE:
                self._write(side, self._pending[side])
            if mask & READ and not self._pending[1 - side]:
                data = self._sockets[side].recv(CHUNK_BYTES)
                if data:
                    self._write(1 - side, data)
                else:
                    self._ended[side] = True
                    self._end(1 - side)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._close(reset=True)
            return
        if all(self._ended) and not any(self._pending):
            self._close(reset=False)
        else:
            self._update()

    def _write(self, side: int, data: bytes) -> None:
        try:
            sent = self._sockets[side].send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self._pending[side] = data[sent:]
        if self._ended[1 - side]:
            self._end(side)

    def _end(self, side: int) -> None:
        if not self._pending[side]:
            self._sockets[side].shutdown(socket.SHUT_WR)

    def _update(self) -> None:
        for side, handler in ((0, self._local_ready), (1, self._remote_ready)):
            events = WRITE if self._pending[side] else 0
            if not self._ended[side] and not self._pending[1 - side]:
                events |= READ
            if events != self._events[side]:
                self._events[side] = events
                self._forwarder.watch(self._sockets[side], events, handler)

    def _local_ready(self, mask: int) -> None:
        self._ready(0, mask)

    def _remote_ready(self, mask: int) -> None:
        self._ready(1, mask)

    def _close(self, *, reset: bool) -> None:
        if self._closed:
            return
        self._closed = True
        for sock, events in zip(self._sockets, self._events, strict=True):
            if events:
                self._forwarder.watch(sock, 0, self._local_ready)
        local, remote = self._sockets
        remote.close()
        if reset:
            close_with_reset(local)
        else:
            local.close()
        self._forwarder.discard_relay(self)
