"""Reads packets for paramiko: with read-ahead, limits for what a host sends, and no needless work per packet."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, cast

import paramiko

KEPT_GREETING_BYTES = 512
MAX_GREETING_BYTES = 32 << 10  # RFC 4253 section 4.2: lines may come before the version, and each is short
MAX_PACKET_BYTES = 256 << 10  # as OpenSSH has it; packets on our channels are far smaller
READ_AHEAD_BYTES = 64 << 10


class BufferedSocket:
    """A socket for paramiko, with read-ahead. It also keeps the beginning of the peer's greeting.

    paramiko reads each packet's first 16 bytes, and then its rest. Each of these system calls would release the
    interpreter's lock.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._position = 0
        self.greeting = b""

    def recv(self, size: int) -> bytes:
        data = self._buffer
        if self._position >= len(data):
            data = self._sock.recv(READ_AHEAD_BYTES)
            if len(self.greeting) < KEPT_GREETING_BYTES:
                self.greeting += data[:KEPT_GREETING_BYTES]
            if len(data) <= size:
                return data
            self._buffer = data
            self._position = 0
        start = self._position
        self._position = start + size
        return data[start : self._position]

    def take_buffered(self, size: int) -> bytes | None:
        """Exactly ``size`` bytes, if that many have been read ahead."""
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
    """paramiko's, with a limit for a line of the greeting and for a packet.

    paramiko itself would collect up to 4 GiB of either, and join all of it again with each piece.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._greeting_bytes = 0

    def _read_timeout(self, timeout: float) -> bytes:
        """Reads a piece of a line; paramiko reads only the greeting by lines."""
        piece: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._greeting_bytes += len(piece)
        if self._greeting_bytes > MAX_GREETING_BYTES:
            raise paramiko.SSHException(f"a greeting of more than {MAX_GREETING_BYTES >> 10} KiB")
        return piece

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if n > MAX_PACKET_BYTES:
            raise paramiko.SSHException(f"a packet of {n} bytes")
        return super().read_all(n, check_rekey)


class FastPacketizer(BoundedPacketizer):
    """Skips what paramiko does for each packet although only the first packets need it.

    For a stream of tokens, where each token is a packet, that is a third of the work.
    """

    def __init__(self, sock: BufferedSocket) -> None:
        super().__init__(cast(socket.socket, sock))  # it needs no other methods of a socket
        self._take: Callable[[int], bytes | None] | None = None
        self._buffered_socket = sock

    def enable_fast_reads(self) -> None:
        """To be called after the handshake: no byte of the greeting is left, and its timer is cancelled."""
        self._take = self._buffered_socket.take_buffered

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if self._take is not None:
            data = self._take(n)
            if data is not None:
                return data
        return super().read_all(n, check_rekey)

    def complete_handshake(self) -> None:
        if self._take is None:
            super().complete_handshake()
