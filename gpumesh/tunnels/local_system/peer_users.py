"""Finds which user of this machine made a connection to a forwarded port, and refuses all but our own and root.

This is done once for each accepted connection. The answer (socket_lookup.py) must belong to the accepted connection and
to no other socket. Three cases need care:

- A socket that no process holds any more (closed, TIME_WAIT) belongs to no user. The kernel shows it with inode 0, and
  with uid 0 or with the uid of a process that has ended. Such a socket must not pass for a socket of root.
- After the peer has closed, another user's socket may take its addresses and ports. This can happen only after our end
  of the connection has been closed too. So our end is checked after the lookup.
- A user that our user namespace does not know has the overflow uid, which may also be the uid of a real user.

On systems that do not show the user (macOS), every user of the machine can use the ports.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpumesh.errors import TunnelError
from gpumesh.text.printable import printable
from gpumesh.tunnels.local_system.proc_net import AddressPair, SocketInfo, make_address_pair
from gpumesh.tunnels.local_system.socket_lookup import ProcNet, SocketLookup, open_socket_lookup
from gpumesh.tunnels.local_system.sockets import is_tcp

# The states of a socket with a peer: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING (tcp_states.h).
# If no connection has these ports, the lookup may return a listener, which is another socket.
_CONNECTED = frozenset({1, 4, 5, 8, 9, 11})

REPORT_INTERVAL_S = 60.0  # the least time between two reports of the same refused user
MAX_REPORTED_USERS = 64  # at most this many users are reported in that time

OnPeerRefused = Callable[[int, int], None]
"""Called with the local port, and with the uid of the user whose connection was refused."""


class OwnUserFilter:
    """Allows connections of our own user and of root. Only one thread may use a filter.

    ``on_refused`` is called in this thread, for each uid at most once in ``REPORT_INTERVAL_S``. A client that has gone
    already is not reported.
    """

    def __init__(
        self, lookup: SocketLookup, on_refused: OnPeerRefused, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lookup = lookup
        self._on_refused = on_refused
        self._clock = clock
        # The overflow uid stands for many users, so it is never allowed, not even if it is our own.
        self._allowed = frozenset({0, os.geteuid()} - {overflow_uid()})
        self._reported_at: dict[int, float] = {}  # by uid

    def allows(self, connection: socket.socket, peer: Any) -> bool:
        """Whether our own user or root made the connection. ``peer`` is the address that ``accept`` returned.

        A connection to a Unix socket is always allowed: the mode of the socket keeps other users out.
        """
        if not is_tcp(connection):
            return True
        uid = self.find_peer_uid(connection, peer)
        if uid in self._allowed:
            return True
        if uid is not None:
            self._report(connection, uid)
        return False

    def find_peer_uid(self, connection: socket.socket, peer: Any) -> int | None:
        """The uid of the user who made the socket at the other end; ``None``: no process holds that socket any more, or
        the user cannot be found out."""
        try:
            info = self._look_up(make_address_pair(peer, connection.getsockname(), connection.family))
            connection.getpeername()  # raises when our end is closed; then another socket may have these ports
        except OSError:
            return None
        # No socket has these ports, or no process holds the socket, or it is a listener and not the peer's socket.
        if info is None or info.inode == 0 or info.state not in _CONNECTED:
            return None
        return info.uid

    def close(self) -> None:
        self._lookup.close()

    def _look_up(self, pair: AddressPair) -> SocketInfo | None:
        """Finds a socket with ``_lookup``, or in /proc/net if that fails. Raises OSError when both fail."""
        try:
            return self._lookup(pair)
        except OSError:  # netlink has no buffers or no memory
            return ProcNet()(pair)

    def _report(self, connection: socket.socket, uid: int) -> None:
        """Reports a refused user, unless this user, or too many users, were reported a short time ago."""
        now = self._clock()
        self._reported_at = {
            user: reported_at
            for user, reported_at in self._reported_at.items()
            if now - reported_at < REPORT_INTERVAL_S
        }
        if uid not in self._reported_at and len(self._reported_at) < MAX_REPORTED_USERS:
            self._reported_at[uid] = now
            with suppress(OSError):  # the client has gone already
                _host, port, *_ = connection.getsockname()
                self._on_refused(port, uid)


def can_identify_peers(listener: socket.socket) -> bool:
    """Whether this system shows which user connects to ``listener``. Raises OSError as ``open_socket_lookup`` does."""
    lookup = open_socket_lookup(listener)
    if lookup is not None:
        lookup.close()
    return lookup is not None


def open_own_user_filter(listener: socket.socket, on_refused: OnPeerRefused) -> OwnUserFilter | None:
    """Makes a filter for connections to ``listener``. ``None``: all connections are served.

    All connections are served at a Unix socket, whose mode keeps other users out, and on other systems than Linux,
    where no filter is possible. Raises TunnelError on Linux when the user cannot be found out now: a port for our own
    user must not be open to all.
    """
    if listener.family == socket.AF_UNIX or sys.platform != "linux":
        return None
    reason = "this system does not say"
    try:
        lookup = open_socket_lookup(listener)
    except OSError as error:  # descriptors or memory are short, so the trial was not possible
        lookup = None
        reason = os.strerror(error.errno or 0)
    if lookup is None:
        raise TunnelError(f"whose connections come to the local port cannot be told: {reason}")
    return OwnUserFilter(lookup, on_refused)


def find_user_name(uid: int) -> str | None:
    """The name of the user ``uid``, safe to print; ``None``: there is no such user. Blocks while a directory service is
    asked."""
    import pwd  # POSIX only

    try:
        return printable(pwd.getpwuid(uid).pw_name, 64)
    except KeyError:
        return None


def overflow_uid() -> int | None:
    """The uid that stands for all users whom our user namespace does not know; ``None``: it knows all users."""
    try:
        uid_ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if uid_ranges == [["0", "0", "4294967295"]]:  # one range: first uid inside, first uid outside, count
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534  # the kernel's default
