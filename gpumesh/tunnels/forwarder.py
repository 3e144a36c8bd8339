"""The selector thread of a tunnel: accepts, reads and writes all local sockets. Both transports use it.

One thread serves all connections. sshtunnel has a thread for each connection: at 256 streams of 100 tokens/s each chunk
then costs several thread switches, and waiting clients overflow its listen backlog of 5 (docs/internals/tunnels.md).

A *dialer* decides where an accepted connection goes: ``openssh.unix_relay.relay_to_unix`` (ssh's own forward listens on
a Unix socket) or ``inprocess.channel_multiplexer.ChannelMultiplexer.make_dialer`` (a channel on a paramiko transport).

The listening sockets belong to the supervisor, which shares them with each worker in turn. A worker accepts only after
``start``. While no worker is connected, clients wait in the kernel's queue of ``BACKLOG`` connections instead of being
refused.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from gpumesh.tunnels.local_system.sockets import close_with_reset, disable_nagle

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

BACKLOG = 1024  # clients that can wait in the kernel's queue, for example while the tunnel reconnects
CHUNK_BYTES = 64 * 1024  # the most that one read of a socket takes
ACCEPTS_PER_EVENT = 64  # after this many accepts in a row, other sockets get their turn
ACCEPT_RETRY_S = 0.1  # after an accept for which the system had no descriptor or no memory

Handler = Callable[[int], None]
"""Called with the events (READ, WRITE) for which its socket is ready."""


class _Timer(NamedTuple):
    due_at: float  # monotonic seconds
    id: int  # keeps timers of the same time in the order in which they were set
    callback: Callable[[], None]


class Dialer(Protocol):
    """Forwards ``local``, a non-blocking accepted socket, and later closes it.

    A dialer is called in the selector's thread, so it must not block. Raises OSError when no connection can be made.
    """

    def __call__(self, forwarder: Forwarder, local: socket.socket) -> None: ...


class PeerFilter(Protocol):
    """Decides, in the selector's thread, which users' connections are served (local_system/peer_users.py)."""

    def allows(self, connection: socket.socket, peer: Any) -> bool:
        """Whether ``connection`` is served. ``peer`` is the address that ``accept`` returned."""

    def close(self) -> None: ...


class Relay(Protocol):
    """A connection that is being forwarded."""

    def abort(self) -> None:
        """Closes both ends at once. The local end is reset, so that a client does not take a cut answer for a whole
        one."""


class ForwarderState(StrEnum):
    NEW = "new"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class Forwarder:
    """The selector thread and the sockets that it watches.

    ``listen`` comes before ``start``. ``post`` may be called from any thread. The methods under "in the selector's
    thread" are for dialers and relays.
    """

    def __init__(self, on_end: Callable[[], None] | None = None, *, peer_filter: PeerFilter | None = None) -> None:
        """``on_end`` is called in the selector's thread when the loop has ended, by ``close`` or by an error. A
        connection that ``peer_filter`` does not allow is reset; without a filter all connections are served."""
        self.progressed_at = 0.0  # when a Unix relay has last passed bytes on, by ``time.monotonic``; 0.0: never
        self._on_end = on_end
        self._peer_filter = peer_filter
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, READ, self._drain_wakeups)
        self._posted: deque[Callable[[], None]] = deque()  # calls for the selector's thread
        self._timers: list[_Timer] = []  # a heap: the first timer is the next to be due
        self._timer_ids = itertools.count()
        self._listeners: list[tuple[socket.socket, Dialer]] = []  # each with the dialer of its connections
        self._relays: set[Relay] = set()
        self._state = ForwarderState.NEW
        self._state_lock = threading.Lock()  # ``run`` and ``close`` are called in different threads
        self._finished = threading.Event()

    def __repr__(self) -> str:
        return f"<Forwarder {self._state.upper()} {len(self._listeners)} listeners {self.connections} connections>"

    @property
    def connections(self) -> int:
        """How many connections are being forwarded now."""
        return len(self._relays)

    def listen(self, listener: socket.socket, dialer: Dialer) -> None:
        """Gives the connections of ``listener`` to ``dialer``, once the loop runs. The caller closes ``listener``."""
        listener.setblocking(False)
        self._listeners.append((listener, dialer))

    def start(self) -> None:
        """Starts accepting, in a new thread."""
        threading.Thread(target=self.run, name="forwarder", daemon=True).start()

    def run(self) -> None:
        """Runs the loop in the caller's own thread; ``start`` runs it in a new thread. Returns after ``close``."""
        with self._state_lock:
            if self._state is not ForwarderState.NEW:
                return  # ``close`` came first and has released everything
            self._state = ForwarderState.RUNNING
        for listener, dialer in self._listeners:
            self._watch_listener(listener, dialer)
        running = ForwarderState.RUNNING  # a local name: in Python 3.11 each look-up of a member calls a function
        try:
            while self._state is running:
                for key, ready_events in self._selector.select(self._seconds_to_next_timer()):
                    handler: Handler = key.data
                    handler(ready_events)
                self._run_due_timers()
                while self._posted:
                    callback = self._posted.popleft()
                    callback()
        finally:
            self._tear_down()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Ends the loop, resets every connection and waits for that. Returns false when it takes longer than
        ``timeout_s``.

        May be called twice, and from any thread but the selector's.
        """
        with self._state_lock:
            old_state = self._state
            if old_state is not ForwarderState.ENDED:
                self._state = ForwarderState.STOPPING
        if old_state is ForwarderState.NEW:  # no loop runs that would call ``_tear_down`` at its end
            self._tear_down()
        self._wake()
        return self._finished.wait(timeout_s)

    def post(self, callback: Callable[[], None]) -> None:
        """Runs ``callback`` soon in the selector's thread, or not at all if the loop has ended."""
        self._posted.append(callback)
        self._wake()

    # -- in the selector's thread ------------------------------------------------------------------------------------

    def watch(self, sock: socket.socket, events: int, handler: Handler) -> None:
        """Calls ``handler`` whenever ``sock`` is ready for some of ``events`` (READ, WRITE). ``events`` 0 ends the
        watch."""
        current_watch = self._selector.get_map().get(sock)
        if current_watch is None:
            if events:
                self._selector.register(sock, events, handler)
        elif not events:
            self._selector.unregister(sock)
        elif current_watch.events != events:
            self._selector.modify(sock, events, handler)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Calls ``callback`` in the selector's thread after ``delay_s``. A timer cannot be cancelled."""
        heapq.heappush(self._timers, _Timer(time.monotonic() + delay_s, next(self._timer_ids), callback))

    def add_relay(self, relay: Relay) -> None:
        """Registers ``relay``. The end of the loop aborts all registered relays."""
        self._relays.add(relay)

    def discard_relay(self, relay: Relay) -> None:
        """Forgets ``relay``, because it has ended."""
        self._relays.discard(relay)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _watch_listener(self, listener: socket.socket, dialer: Dialer) -> None:
        self.watch(listener, READ, lambda _: self._accept(listener, dialer))

    def _accept(self, listener: socket.socket, dialer: Dialer) -> None:
        """Accepts the connections that wait at ``listener``, and gives each allowed connection to ``dialer``."""
        for _ in range(ACCEPTS_PER_EVENT):
            try:
                local, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return  # no client waits, or the client has gone; the watch calls again for the next client
            except OSError:
                # No descriptor or memory is left. The listener stays ready, so a watch would call this again at once.
                self._selector.unregister(listener)
                self.call_later(ACCEPT_RETRY_S, lambda: self._watch_listener(listener, dialer))
                return
            try:
                local.setblocking(False)
                disable_nagle(local)
                if self._peer_filter is None or self._peer_filter.allows(local, peer):
                    dialer(self, local)
                else:
                    close_with_reset(local)
            except OSError:  # no descriptor is left for the other side; only this connection ends
                close_with_reset(local)

    def _drain_wakeups(self, _: int) -> None:
        """Reads the bytes that ``_wake`` wrote; they have no meaning but to end the wait in ``select``."""
        try:
            while self._wake_reader.recv(4096):
                pass
        except (BlockingIOError, InterruptedError):  # all bytes have been read
            pass

    def _wake(self) -> None:
        """Ends the wait in ``select``, so that the loop sees a posted callback or a new state. For any thread."""
        try:
            self._wake_writer.send(b"\0")
        except (BlockingIOError, InterruptedError):
            pass  # the pipe is full: a wake-up is waiting already
        except OSError:
            pass  # closed: the loop has ended

    def _seconds_to_next_timer(self) -> float | None:
        """Seconds until the next timer is due, never negative; ``None``: there is no timer."""
        return max(0.0, self._timers[0].due_at - time.monotonic()) if self._timers else None

    def _run_due_timers(self) -> None:
        while self._timers and self._timers[0].due_at <= time.monotonic():
            timer = heapq.heappop(self._timers)
            timer.callback()

    def _tear_down(self) -> None:
        """Aborts all relays and releases everything that the forwarder owns. Called once, when the loop has ended or
        will never run."""
        for relay in list(self._relays):
            relay.abort()
        self._selector.close()
        self._wake_writer.close()
        self._wake_reader.close()
        self._posted.clear()
        if self._peer_filter is not None:
            self._peer_filter.close()
        self._state = ForwarderState.ENDED
        self._finished.set()
        if self._on_end is not None:
            self._on_end()
