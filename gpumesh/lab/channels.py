"""Moves bytes between asyncio and paramiko's channels without a thread per channel, for the simulated SSH server.

A channel's ``fileno`` tells the event loop when there are bytes to read. The loop also sends, and must never wait. So
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
HIGH_WATER = 1 << 18  # bytes of a channel that are not sent yet; with so many, the source should pause
LOW_WATER = HIGH_WATER // 2  # with fewer bytes that are not sent yet, the source may go on
RETRY_S = 0.003  # seconds between two attempts to send: paramiko has no call-back for a window that opens


class ChannelIo:
    """Reads and writes one channel without blocking the event loop.

    ``on_data`` is called with each piece of the client's bytes, and once with empty bytes at their end.
    """

    def __init__(self, channel: paramiko.Channel, on_data: Callable[[bytes], None]) -> None:
        self._channel = channel
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self._unsent_stdout = bytearray()
        self._unsent_stderr = bytearray()
        self._eof_pending = False  # the end is sent after the bytes that are not sent yet
        self._retry_timer: asyncio.TimerHandle | None = None  # runs while the channel takes no bytes
        self._drained = asyncio.Event()  # set when fewer bytes than LOW_WATER are unsent, or the channel is closed
        self._drained.set()
        self._reading = False  # whether the channel is read
        self._closed = False
        channel.settimeout(0.0)  # a read or a send never waits: it raises TimeoutError in that case
        sock = channel.get_transport().sock
        self._connection_poll = select.poll()  # tells whether the connection's socket takes bytes
        self._connection_poll.register(sock.fileno(), select.POLLOUT)
        self._channel_fd = channel.fileno()
        self.resume()

    @property
    def closed(self) -> bool:
        """Whether this side, the client or the end of the connection has closed the channel."""
        return self._closed or self._channel.closed

    @property
    def _unsent_bytes(self) -> int:
        """The number of bytes that the channel has not taken yet."""
        return len(self._unsent_stdout) + len(self._unsent_stderr)

    def resume(self) -> None:
        """Starts reading, or reads again after ``pause``."""
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.add_reader(self._channel_fd, self._read)

    def pause(self) -> None:
        """Stops reading: the client's next bytes stay in the channel, whose window then stops the client."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._channel_fd)

    def write(self, data: bytes, *, error: bool = False) -> bool:
        """Sends ``data``, and keeps the bytes that the channel does not take yet. A closed channel ignores ``data``.

        Returns false if the caller should pause and ``wait_drained``. ``error``: ``data`` goes to standard error.
        """
        if not self.closed:
            buffer = self._unsent_stderr if error else self._unsent_stdout
            buffer.extend(data)
            self._flush()
        return self._unsent_bytes < HIGH_WATER

    async def wait_drained(self) -> None:
        """Waits until the source may write again. Raises ``ConnectionError`` when the channel is closed."""
        while not self.closed and self._unsent_bytes >= LOW_WATER:
            self._drained.clear()
            await self._drained.wait()
        if self.closed:
            raise ConnectionResetError("the client closed the channel")

    async def wait_flushed(self) -> None:
        """Waits until all bytes are sent, or the channel is closed."""
        while self._unsent_bytes and not self.closed:
            self._drained.clear()
            await self._drained.wait()

    def write_eof(self) -> None:
        """Tells the client that no more bytes come, as soon as the unsent bytes are sent."""
        self._eof_pending = True
        self._flush()

    def close(self) -> None:
        """Closes the channel at once. Unsent bytes are lost."""
        if self._closed:
            return
        self.pause()
        self._closed = True
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._drained.set()
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # the connection has ended already
            self._channel.close()

    def _read(self) -> None:
        """Passes the next bytes to ``on_data``. The event loop calls this when the channel has bytes or has ended."""
        try:
            data = self._channel.recv(READ_SIZE)
        except TimeoutError:  # there was nothing to read
            return
        except OSError:  # the connection has failed: for the reader, this is the end of the bytes
            data = b""
        if not data:
            self.pause()  # after the end, the channel's file descriptor would stay readable for ever
        self._on_data(data)

    def _flush(self) -> None:
        """Sends what the channel takes now, and calls itself again in a moment if bytes are left."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        try:
            self._send_unsent_bytes()
        except TimeoutError:  # the channel takes no more bytes now
            self._retry_timer = self._loop.call_later(RETRY_S, self._flush)
        except (OSError, EOFError, paramiko.SSHException):  # the channel or the connection has ended
            self.close()
            return
        if self.closed:  # no one takes these bytes any more
            self._unsent_stdout.clear()
            self._unsent_stderr.clear()
        if self._unsent_bytes < LOW_WATER:
            self._drained.set()
        if self._eof_pending and not self._unsent_bytes and not self.closed:  # the end goes after the last byte
            self._eof_pending = False
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # the connection has just ended
                self._channel.shutdown_write()

    def _send_unsent_bytes(self) -> None:
        """Sends all unsent bytes, standard error first. Raises ``TimeoutError`` when no more can be sent now."""
        while self._unsent_bytes and not self.closed:
            # Without this check, paramiko would block the event loop while the client does not read.
            connection_takes_bytes = self._connection_poll.poll(0)  # 0 ms: does not wait
            if not connection_takes_bytes:
                raise TimeoutError
            if self._unsent_stderr:
                sent = self._channel.send_stderr(bytes(self._unsent_stderr[:READ_SIZE]))
                del self._unsent_stderr[:sent]
            else:
                sent = self._channel.send(bytes(self._unsent_stdout[:READ_SIZE]))
                del self._unsent_stdout[:sent]


class ChannelStreams:
    """The standard streams of a command (``shell.StandardStreams``) on its session channel."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._io = ChannelIo(channel, self._add_input)

    def _add_input(self, data: bytes) -> None:
        self._input.put_nowait(data)
        self._io.pause()  # until the command reads again: its unread input must not fill this process's memory

    async def read(self) -> bytes:
        """The next bytes of standard input; empty at their end."""
        if self._input.empty():
            self._io.resume()
        data = await self._input.get()
        if not data:
            self._input.put_nowait(b"")  # each later read also finds the end of the input
        return data

    async def write(self, data: bytes, *, error: bool = False) -> None:
        """Writes to standard output, or to standard error if ``error``. Waits while the client does not read."""
        if not self._io.write(data, error=error):
            await self._io.wait_drained()

    async def wait_closed(self) -> None:
        """Waits until the client closes the channel. A read would show this too, but some commands never read."""
        while not self._io.closed:  # noqa: ASYNC110  # paramiko has no event for it
            await asyncio.sleep(0.05)

    async def finish(self, status: int) -> None:
        """Sends the exit status, after all output. A client that has closed the channel gets none."""
        await self._io.wait_flushed()
        if not self._io.closed:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):  # the connection has just ended
                self._channel.send_exit_status(status)

    def close(self) -> None:
        self._io.close()


class ForwardedChannel(asyncio.Protocol):
    """Passes bytes between a direct-tcpip channel and its connection to a port on loopback, in both directions.

    When one side ends its bytes, the other side is told that they have ended. When both have ended, both are closed.
    ``on_end`` is then called with this object.
    """

    def __init__(self, channel: paramiko.Channel, on_end: Callable[[ForwardedChannel], None]) -> None:
        self._io = ChannelIo(channel, self._pass_to_server)
        self._io.pause()  # until the local connection is there
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._drain_task: asyncio.Task[None] | None = None  # while reading from the server is paused
        self._finish_task: asyncio.Task[None] | None = None  # closes both sides when both have ended
        self._client_ended = False  # the client sends no more bytes
        self._server_ended = False  # the server sends no more bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to pass bytes: the local connection is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclasses of asyncio's
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a small piece does not wait for the next one
        self._io.resume()

    def data_received(self, data: bytes) -> None:
        """Passes the server's bytes to the client. Stops reading from the server while the client does not read."""
        takes_more = self._io.write(data)
        is_paused = self._drain_task is not None
        if not takes_more and not is_paused and self._transport is not None:
            self._transport.pause_reading()
            self._drain_task = asyncio.ensure_future(self._resume_when_drained())

    async def _resume_when_drained(self) -> None:
        """Reads from the server again when the client has taken the earlier bytes."""
        with contextlib.suppress(ConnectionError):  # the client has gone: the server's next bytes are thrown away
            await self._io.wait_drained()
        self._drain_task = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Stops reading from the client: the server does not take the client's bytes now."""
        self._io.pause()

    def resume_writing(self) -> None:
        """Reads from the client again: the server takes bytes again."""
        if not self._client_ended:
            self._io.resume()

    def eof_received(self) -> bool:
        """Tells the client that the server has sent its last bytes."""
        self._server_ended = True
        self._io.write_eof()
        self._finish_if_both_ended()
        return True  # tells asyncio to keep the other direction open

    def connection_lost(self, error: Exception | None) -> None:
        """Closes the channel after the last bytes: the local connection has ended."""
        del error
        self._transport = None
        self._finish_soon()

    def close(self) -> None:
        """Closes both sides at once. Unsent bytes are lost."""
        for task in (self._drain_task, self._finish_task):
            if task is not None:
                task.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._io.close()
        self._on_end(self)

    def _pass_to_server(self, data: bytes) -> None:
        """Sends the client's bytes to the server. Empty bytes are the end of the client's bytes."""
        if self._transport is None:
            return
        if data:
            self._transport.write(data)
            return
        self._client_ended = True
        if self._io.closed:  # the client has closed both directions: no answer could reach it
            self._transport.close()  # asyncio sends its unsent bytes first
            return
        if not self._server_ended:
            with contextlib.suppress(OSError):  # the server has just closed the connection
                self._transport.write_eof()
        self._finish_if_both_ended()

    def _finish_if_both_ended(self) -> None:
        """Closes both sides if neither side sends any more."""
        if self._client_ended and self._server_ended:
            self._finish_soon()

    def _finish_soon(self) -> None:
        """Closes both sides as soon as the client has all bytes."""
        if self._finish_task is None:
            self._finish_task = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        """Waits until the client has all bytes, and closes both sides."""
        await self._io.wait_flushed()
        self._finish_task = None
        self.close()
