"""Traffic through a tunnel, for tests: an echo server, and a client that sends and reads to the end."""

from __future__ import annotations

import asyncio
import socket

DEADLINE_S = 30.0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """For ``sshd.serving``: sends everything back, and ends its direction when the client has ended."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass  # the client is gone; ENOTCONN is no ConnectionError


async def exchange(port: int, data: bytes) -> bytes:
    """Sends ``data`` to a local port, then EOF, and reads to the end. Raises ``ConnectionResetError`` after a reset."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)

        async def send() -> None:
            await loop.sock_sendall(sock, data)
            sock.shutdown(socket.SHUT_WR)

        async def receive() -> bytes:
            received = bytearray()
            while piece := await loop.sock_recv(sock, 65536):
                received += piece
            return bytes(received)

        async with asyncio.timeout(DEADLINE_S):
            await loop.sock_connect(sock, ("127.0.0.1", port))
            # The reset shows in one of the two; the other may see an ordinary end.
            sent, received = await asyncio.gather(send(), receive(), return_exceptions=True)
    for outcome in (sent, received):
        if isinstance(outcome, OSError):
            raise ConnectionResetError from outcome
        if isinstance(outcome, BaseException):
            raise outcome
    assert isinstance(received, bytes)
    return received
