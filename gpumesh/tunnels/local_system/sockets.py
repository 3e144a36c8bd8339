"""Sets options of connected sockets: close with a reset (SO_LINGER), no delay of small packets (TCP_NODELAY)."""

from __future__ import annotations

import contextlib
import socket
import struct

_LINGER_ZERO = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: close sends a reset


def is_tcp(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6)


def disable_nagle(sock: socket.socket) -> None:
    """Sets TCP_NODELAY: small packets do not wait. Ignores a Unix socket. Raises OSError for a dead connection."""
    if is_tcp(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset_on_close(sock: socket.socket) -> None:
    """Makes a later close of the socket, in any code, send a reset. A Unix socket has no reset."""
    with contextlib.suppress(OSError):  # the socket is not connected any more
        if is_tcp(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def close_with_reset(sock: socket.socket) -> None:
    """Closes the socket so that a TCP peer gets a reset, not an ordinary end: a cut answer must not look whole."""
    reset_on_close(sock)
    sock.close()
