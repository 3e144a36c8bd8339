"""Relays between the Unix sockets that we share with an ``ssh``, and the connections of this machine's programs.

For a forward, ssh listens at a Unix socket, and ``relay_to_unix`` connects to it. For a reverse forward we listen at a
Unix socket, to which ssh connects, and ``relay_to_port`` connects to a port of this machine.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from gpumesh.tunnels.forwarder import CHUNK_BYTES, READ, WRITE, Dialer, Forwarder
from gpumesh.tunnels.local_connect import LocalConnect
from gpumesh.tunnels.local_system.sockets import close_with_reset

CONNECT_RETRY_S = 0.005  # the time between two tries while ssh's listen queue is full
CONNECT_TRIES = 400  # 2 s together

# The end of a connection that came from the host is passed on after this time, if ssh still listens at its control
# socket. An ssh that dies ends its sockets in the same way, and a cut connection must not look whole.
END_DELAY_S = 0.1

LOCAL, REMOTE = 0, 1  # the two sides of a relay: the accepted socket, and the socket that we have connected


def relay_to_unix(path: str) -> Dialer:
    """Makes a dialer that forwards to the Unix socket at ``path``. If that socket refuses, the client is reset."""

    def dial(forwarder: Forwarder, local: socket.socket) -> None:
        UnixRelay(forwarder, local, path)

    return dial


def relay_to_port(port: int, control: Path) -> Dialer:
    """Makes a dialer that forwards ssh's connections to 127.0.0.1:``port``; if nothing listens there, ends them.
    ``control`` is ssh's control socket, by which its death is noticed."""

    def dial(forwarder: Forwarder, local: socket.socket) -> None:
        def on_end(to_port: socket.socket | None) -> None:
            if to_port is None:
                local.close()
            else:
                ReverseRelay(forwarder, local, to_port, control).start()

        LocalConnect(forwarder, port, on_end)

    return dial


class SocketRelay:
    """Passes bytes in both directions between its two sides.

    A socket is read only when all bytes that came from it have been written to the other socket. So a slow reader stops
    the sender, and at most ``CHUNK_BYTES`` are held for each direction.
    """

    def __init__(self, forwarder: Forwarder, local: socket.socket, remote: socket.socket) -> None:
        self._forwarder = forwarder
        self._sockets = (local, remote)
        # Each list has one item for each side. ``1 - side`` is the other side.
        self._pending = [b"", b""]  # bytes that wait to be written to this side's socket
        self._reads = [True, True]  # this side's socket may send more bytes
        self._ended = [False, False]  # this side's socket has sent its last byte, and the other side may know
        self._events = [0, 0]  # the events for which the selector watches this side's socket
        self._closed = False
        forwarder.add_relay(self)

    def start(self) -> None:
        """Begins to pass bytes. Both sockets are connected."""
        self._update_watch()

    def abort(self) -> None:
        self._close(reset=True)

    def _on_local_ready(self, ready_events: int) -> None:
        self._on_ready(LOCAL, ready_events)

    def _on_remote_ready(self, ready_events: int) -> None:
        self._on_ready(REMOTE, ready_events)

    def _on_ready(self, side: int, ready_events: int) -> None:
        """Called when this side's socket is ready for ``ready_events`` (READ, WRITE): writes first, then reads."""
        if self._closed:
            return  # closed by the other side's event, in the same pass of the loop
        try:
            if ready_events & WRITE:
                self._write(side, self._pending[side])
            if ready_events & READ and not self._pending[1 - side]:
                self._read(side)
        except (BlockingIOError, InterruptedError):
            pass  # the socket was not ready any more; its watch calls again
        except OSError:  # a side has reset its connection
            self._close(reset=True)
            return
        self._settle()

    def _settle(self) -> None:
        """Called after each step: closes the relay if its work is done, or else waits for the next event."""
        # Both sides have sent their last byte, and all bytes are written.
        if all(self._ended) and not any(self._pending):
            self._close(reset=False)
        else:
            self._update_watch()

    def _read(self, side: int) -> None:
        """Reads from this side's socket, and writes the bytes, or passes on the end, to the other side."""
        data = self._sockets[side].recv(CHUNK_BYTES)
        if data:
            self._forwarder.progressed_at = time.monotonic()
            self._write(1 - side, data)
        else:
            self._reads[side] = False
            self._end_side(side)

    def _end_side(self, side: int) -> None:
        """Passes the end of this side's bytes on to the other side."""
        self._ended[side] = True
        self._shut_down_when_written(1 - side)

    def _write(self, side: int, data: bytes) -> None:
        """Writes ``data`` to this side's socket; the bytes for which there is no room become ``_pending``."""
        try:
            sent = self._sockets[side].send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self._pending[side] = data[sent:]  # nothing else was pending, or ``data`` was what was pending
        if self._ended[1 - side]:
            self._shut_down_when_written(side)

    def _shut_down_when_written(self, side: int) -> None:
        """Passes the other side's end on to this side's socket, unless bytes still wait to be written."""
        if not self._pending[side]:
            self._sockets[side].shutdown(socket.SHUT_WR)

    def _update_watch(self) -> None:
        """Watches each side for WRITE while bytes wait for it, and for READ while no bytes wait for the other side."""
        for side, handler in ((LOCAL, self._on_local_ready), (REMOTE, self._on_remote_ready)):
            events = WRITE if self._pending[side] else 0
            if self._reads[side] and not self._pending[1 - side]:
                events |= READ
            if events != self._events[side]:
                self._events[side] = events
                self._forwarder.watch(self._sockets[side], events, handler)

    def _close(self, *, reset: bool) -> None:
        """Closes both sockets, once. ``reset``: so that a client does not take a cut answer for a whole one."""
        if self._closed:
            return
        self._closed = True
        for sock, events in zip(self._sockets, self._events, strict=True):
            if events:
                self._forwarder.watch(sock, 0, self._on_local_ready)  # 0 ends the watch, whatever its handler is
        for sock in self._sockets:
            if reset:
                close_with_reset(sock)
            else:
                sock.close()
        self._forwarder.discard_relay(self)


class UnixRelay(SocketRelay):
    """Connects to the Unix socket at ``path``, and relays the accepted socket ``local`` to it."""

    def __init__(self, forwarder: Forwarder, local: socket.socket, path: str) -> None:
        remote = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        remote.setblocking(False)
        super().__init__(forwarder, local, remote)
        self._path = path
        self._connect(CONNECT_TRIES)

    def _connect(self, tries: int) -> None:
        """Connects to the Unix socket, now or with up to ``tries`` further tries. Aborts when that fails."""
        if self._closed:
            return
        try:
            self._sockets[REMOTE].connect(self._path)
        except BlockingIOError:
            # ssh's listen queue is full. No event reports when a Unix socket has room again.
            if tries > 0:
                self._forwarder.call_later(CONNECT_RETRY_S, lambda: self._connect(tries - 1))
            else:
                self.abort()
        except OSError:  # ssh has ended, or does not listen there any more
            self.abort()
        else:
            self.start()


class ReverseRelay(SocketRelay):
    """Relays a connection that came from the host: the accepted socket is ssh's. ``control`` is its control socket."""

    def __init__(self, forwarder: Forwarder, local: socket.socket, remote: socket.socket, control: Path) -> None:
        super().__init__(forwarder, local, remote)
        self._control = control

    def _end_side(self, side: int) -> None:
        """Ends a side as the base class; the end of the host is passed on a little later."""
        if side == LOCAL:
            self._forwarder.call_later(END_DELAY_S, self._pass_end_of_host)
        else:
            super()._end_side(side)

    def _pass_end_of_host(self) -> None:
        """Ends the local program's input, because the host has ended its side; resets it if ssh has died."""
        if self._closed:
            return
        if not _is_listening(self._control):
            self._close(reset=True)
            return
        try:
            super()._end_side(LOCAL)
        except OSError:  # the local program has reset its connection
            self._close(reset=True)
        else:
            self._settle()


def _is_listening(path: Path) -> bool:
    """Whether a program listens at this Unix socket. A full queue does, too."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True
