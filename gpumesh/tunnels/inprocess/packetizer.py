"""Reads packets for paramiko: reads ahead, limits what a host may send, and avoids needless work for each packet."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, cast

import paramiko

KEPT_GREETING_BYTES = 512  # enough for an error message that quotes the greeting
MAX_GREETING_BYTES = 32 << 10  # far more than the short lines that may come before the version (RFC 4253 section 4.2)
MAX_PACKET_BYTES = 256 << 10  # the same limit as in OpenSSH; packets on our channels are far smaller
READ_AHEAD_BYTES = 64 << 10  # the most that one read of the socket takes


class BufferedSocket:
    """A socket for paramiko that reads ahead. It also keeps the beginning of the peer's greeting.

    paramiko reads the first 16 bytes of each packet, and then the rest. Without read-ahead each read would be a system
    call, which releases the interpreter's lock.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._position = 0  # the bytes of the buffer before this position were given to paramiko
        self.greeting = b""

    def recv(self, size: int) -> bytes:
        """Returns 1 to ``size`` bytes: the next from the buffer, or a new read of the socket. Empty: the end."""
        data = self._buffer
        if self._position >= len(data):
            data = self._sock.recv(READ_AHEAD_BYTES)
            if len(self.greeting) < KEPT_GREETING_BYTES:
                self.greeting += data[:KEPT_GREETING_BYTES]
            if len(data) <= size:  # all of it is given out, so the old buffer stays used up
                return data
            self._buffer = data
            self._position = 0
        start = self._position
        self._position = start + size
        return data[start : self._position]

    def take_buffered(self, size: int) -> bytes | None:
        """Returns exactly ``size`` bytes; ``None``: fewer have been read ahead."""
        start = self._position
        end = start + size
        if end > len(self._buffer):
            return None
        self._position = end
        return self._buffer[start:end]

    def send(self, data: bytes) -> int:
        return self._sock.send(data)

    def settimeout(self, timeout_s: float | None) -> None:
        self._sock.settimeout(timeout_s)

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    @property
    def _closed(self) -> bool:
        """paramiko's ``Transport.stop_thread`` reads this private attribute of a socket."""
        return self._sock.fileno() < 0


class BoundedPacketizer(paramiko.packet.Packetizer):
    """paramiko's packetizer, with limits for the size of the greeting and of a packet.

    paramiko itself would collect up to 4 GiB of either, and copy all of it again with each piece that comes.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.received_at = 0.0  # when the last bytes came, by ``time.monotonic``; 0.0: none came
        self._greeting_bytes = 0

    def _read_timeout(self, timeout: float) -> bytes:
        """Reads a piece of the greeting. paramiko calls this to read lines, and only the greeting consists of lines."""
        piece: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._greeting_bytes += len(piece)
        if self._greeting_bytes > MAX_GREETING_BYTES:
            raise paramiko.SSHException(f"a greeting of more than {MAX_GREETING_BYTES >> 10} KiB")
        return piece

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Reads exactly ``n`` bytes: all or a part of one packet."""
        if n > MAX_PACKET_BYTES:
            raise paramiko.SSHException(f"a packet of {n} bytes")
        data: bytes = super().read_all(n, check_rekey)
        self.received_at = time.monotonic()
        return data


class FastPacketizer(BoundedPacketizer):
    """Skips work that paramiko does for each packet although only the first packets need it.

    In a stream of tokens each token is a packet, and this work is a third of all work for it.
    """

    def __init__(self, sock: BufferedSocket) -> None:
        super().__init__(cast(socket.socket, sock))  # paramiko calls only the methods that BufferedSocket has
        self._take: Callable[[int], bytes | None] | None = None  # ``None`` during the handshake
        self._buffered_socket = sock

    def enable_fast_reads(self) -> None:
        """Lets ``read_all`` read from the buffer, and ``complete_handshake`` do nothing.

        Must be called after the handshake, when no byte of the greeting is left and the handshake's timer is cancelled.
        """
        self._take = self._buffered_socket.take_buffered

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Reads exactly ``n`` bytes: from the buffer if it holds them, otherwise as paramiko does."""
        if self._take is not None:
            data = self._take(n)
            if data is not None:
                return data
        return super().read_all(n, check_rekey)

    def complete_handshake(self) -> None:
        """Cancels the handshake's timer. paramiko calls this for each packet."""
        if self._take is None:
            super().complete_handshake()
