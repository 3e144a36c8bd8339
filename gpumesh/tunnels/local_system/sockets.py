"""Options of connected sockets: close by a reset, no delay of small packets."""

from __future__ import annotations

import contextlib
import socket
import struct

_LINGER_ZERO = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: close sends a reset


def is_tcp(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6)


def disable_nagle(sock: socket.socket) -> None:
    """TCP_NODELAY; nothing for a Unix socket. Raises OSError for a connection that has ended."""
    if is_tcp(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset_on_close(sock: socket.socket) -> None:
    """Makes a later close, by anybody, send a reset. A Unix socket has no reset."""
    with contextlib.suppress(OSError):  # it is not connected any more
        if is_tcp(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def close_with_reset(sock: socket.socket) -> None:
    """Closes so that a TCP peer gets a reset instead of an ordinary end: it must not take a cut answer for a whole
    one."""
    reset_on_close(sock)
    sock.close()
