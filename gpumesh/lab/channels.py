"""Between asyncio and paramiko's channels, without a thread for each: what the simulated SSH server moves.

A channel's ``fileno`` tells the event loop that there is something to read. Sending goes straight from the loop. It
must not wait there: a window that is full, or a client that does not read, is asked again a few milliseconds later,
and what feeds the channel is paused meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import cast

import paramiko

READ_SIZE = 1 << 16
HIGH_WATER = 1 << 18
RETRY_S = 0.003


class ChannelIo:
    """One channel on the event loop. ``on_data`` gets what the client sends; empty bytes are its end, given once."""

    def __init__(self, channel: paramiko.Channel, on_data: Callable[[bytes], None]) -> None:
        self._channel = channel
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self._out = bytearray()
        self._errors = bytearray()
        self._eof = False
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
        """By us, by the client, or with the connection."""
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
        """Sends, or keeps what cannot be sent yet. False: hold on until ``wait_drained``."""
        if not self.closed:
            (self._errors if error else self._out).extend(data)
            self._flush()
        return len(self._out) + len(self._errors) < HIGH_WATER

    async def wait_drained(self) -> None:
        """Until little is left to send. Raises ``ConnectionError`` when the channel is gone."""
        while not self.closed and len(self._out) + len(self._errors) >= HIGH_WATER // 2:
            self._drained.clear()
            await self._drained.wait()
        if self.closed:
            raise ConnectionResetError("the client closed the channel")

    async def wait_flushed(self) -> None:
        """Until all is sent, or the channel is gone."""
        while (self._out or self._errors) and not self.closed:
            self._drained.clear()
            await self._drained.wait()

    def write_eof(self) -> None:
        """After what is still to be sent."""
        self._eof = True
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
        except TimeoutError:  # a wake-up for nothing
            return
        except OSError:
            data = b""
        if not data:
            self.pause()  # the pipe stays readable for ever after the end
        self._on_data(data)

    def _flush(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        try:
            while (self._out or self._errors) and not self.closed:
                # paramiko would wait, here in the loop, for a client that does not read.
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
        if self._eof and not self._out and not self._errors and not self.closed:
            self._eof = False
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self._channel.shutdown_write()


class ForwardedChannel(asyncio.Protocol):
    """A direct-tcpip channel and the local connection behind it, each half closed as the other side closes it."""

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
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class
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
        self._both_ended()
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
            self._transport.close()  # after what is still to be written
            return
        if not self._server_ended:
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        self._both_ended()

    def _both_ended(self) -> None:
        if self._client_ended and self._server_ended:
            self._finish_soon()

    def _finish_soon(self) -> None:
        if self._finishing is None:
            self._finishing = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self._io.wait_flushed()
        self._finishing = None
        self.close()
