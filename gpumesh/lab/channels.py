"""Moves bytes between asyncio and paramiko's channels, without a thread for each channel. For the simulated SSH server.

A channel's ``fileno`` tells the event loop when there are bytes to read. The loop itself sends, and must not wait. So
if a channel's window is full, or if a client does not read, the loop tries again a few milliseconds later. Until then,
the source of the bytes is paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import cast

import paramiko

READ_SIZE = 1 << 16  # bytes of one read, and of one send
HIGH_WATER = 1 << 18  # bytes that are not sent yet; with more, the source should pause
RETRY_S = 0.003


class ChannelIo:
    """One channel on the event loop. ``on_data`` gets the client's bytes; at their end it gets empty bytes, once."""

    def __init__(self, channel: paramiko.Channel, on_data: Callable[[bytes], None]) -> None:
        self._channel = channel
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self._out = bytearray()
        self._errors = bytearray()
        self._eof_pending = False  # the end is sent after the bytes that are left
        self._retry: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._reading = False
        self._closed = False
        channel.settimeout(0.0)
        sock = channel.get_transport().sock
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLOUT)
        self._fd = channel.fileno()
        self.resume()

    @property
    def closed(self) -> bool:
        """Whether this side, the client or the end of the connection has closed the channel."""
        return self._closed or self._channel.closed

    def resume(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def write(self, data: bytes, *, error: bool = False) -> bool:
        """Sends ``data``, and keeps the part that cannot be sent yet. False: the caller should pause and
        ``wait_drained``. ``error``: ``data`` goes to standard error."""
        if not self.closed:
            (self._errors if error else self._out).extend(data)
            self._flush()
        return len(self._out) + len(self._errors) < HIGH_WATER

    async def wait_drained(self) -> None:
        """Waits until little is left to send. Raises ``ConnectionError`` when the channel is closed."""
        while not self.closed and len(self._out) + len(self._errors) >= HIGH_WATER // 2:
            self._drained.clear()
            await self._drained.wait()
        if self.closed:
            raise ConnectionResetError("the client closed the channel")

    async def wait_flushed(self) -> None:
        """Waits until all bytes are sent, or the channel is closed."""
        while (self._out or self._errors) and not self.closed:
            self._drained.clear()
            await self._drained.wait()

    def write_eof(self) -> None:
        """Ends this side's bytes, after those that are still to be sent."""
        self._eof_pending = True
        self._flush()

    def close(self) -> None:
        if self._closed:
            return
        self.pause()
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._drained.set()
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()

    def _readable(self) -> None:
        try:
            data = self._channel.recv(READ_SIZE)
        except TimeoutError:  # there was nothing to read
            return
        except OSError:
            data = b""
        if not data:
            self.pause()  # after the end, the pipe would stay readable for ever
        self._on_data(data)

    def _flush(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        try:
            while (self._out or self._errors) and not self.closed:
                # Without this check, paramiko would block the event loop while the client does not read.
                if not self._poll.poll(0):
                    raise TimeoutError
                if self._errors:
                    del self._errors[: self._channel.send_stderr(bytes(self._errors[:READ_SIZE]))]
                else:
                    del self._out[: self._channel.send(bytes(self._out[:READ_SIZE]))]
        except TimeoutError:
            self._retry = self._loop.call_later(RETRY_S, self._flush)
        except (OSError, EOFError, paramiko.SSHException):
            self.close()
            return
        if self.closed:
            self._out.clear()
            self._errors.clear()
        if len(self._out) + len(self._errors) < HIGH_WATER // 2:
            self._drained.set()
        if self._eof_pending and not self._out and not self._errors and not self.closed:
            self._eof_pending = False
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self._channel.shutdown_write()


class ForwardedChannel(asyncio.Protocol):
    """A direct-tcpip channel and its local connection. When one side closes its half, the other side's half is
    closed."""

    def __init__(self, channel: paramiko.Channel, on_end: Callable[[ForwardedChannel], None]) -> None:
        self._io = ChannelIo(channel, self._from_client)
        self._io.pause()
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._drain: asyncio.Task[None] | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._client_ended = False
        self._server_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # a cast: uvloop's are no subclasses
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._io.resume()

    def data_received(self, data: bytes) -> None:
        if not self._io.write(data) and self._transport is not None and self._drain is None:
            self._transport.pause_reading()
            self._drain = asyncio.ensure_future(self._wait_drained())

    async def _wait_drained(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._io.wait_drained()
        self._drain = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._io.pause()

    def resume_writing(self) -> None:
        if not self._client_ended:
            self._io.resume()

    def eof_received(self) -> bool:
        self._server_ended = True
        self._io.write_eof()
        self._finish_if_both_ended()
        return True  # the other half stays open

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._transport = None
        self._finish_soon()

    def close(self) -> None:
        for task in (self._drain, self._finishing):
            if task is not None:
                task.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._io.close()
        self._on_end(self)

    def _from_client(self, data: bytes) -> None:
        if self._transport is None:
            return
        if data:
            self._transport.write(data)
            return
        self._client_ended = True
        if self._io.closed:
            self._transport.close()  # sends the bytes that are left first
            return
        if not self._server_ended:
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        self._finish_if_both_ended()

    def _finish_if_both_ended(self) -> None:
        if self._client_ended and self._server_ended:
            self._finish_soon()

    def _finish_soon(self) -> None:
        if self._finishing is None:
            self._finishing = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self._io.wait_flushed()
        self._finishing = None
        self.close()
