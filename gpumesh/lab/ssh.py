"""A simulated host's SSH server: paramiko's, in this process. It authenticates clients, forwards to the host's ports,
and answers a few commands (shell.py). It never runs a program, and never connects to an address other than loopback.

paramiko runs one thread for each connection. Our functions in this thread only make decisions, or post to the event
loop; the event loop does all other work. paramiko has no call-back for an accepted channel. So its private methods
``_queue_incoming_channel`` and ``_send_user_message`` are extended: tests/lab/test_ssh.py fails if a new version of
paramiko changes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_UNKNOWN_CHANNEL_TYPE,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_SUCCESS,
)

from gpumesh.lab.channels import ChannelIo, ForwardedChannel
from gpumesh.lab.profile import Faults
from gpumesh.lab.shell import SimShell

BANNER = "SSH-2.0-OpenSSH_9.6_gpumesh_lab"
CONNECT_TIMEOUT_S = 5.0
NO_REPLY_DELAY_S = 0.02  # before a command whose request wants no reply
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SimSshServer:
    """An async context manager; ``port`` is valid from its start to its end.

    ``ports`` maps the host's apparent ports to real ones on loopback. All other ports refuse connections. ``faults`` is
    called for each connection, login and channel.
    """

    def __init__(
        self,
        shell: SimShell,
        *,
        host_keys: Sequence[paramiko.PKey],
        authorized_keys: Sequence[paramiko.PKey] = (),
        ports: Mapping[int, int] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        faults: Callable[[], Faults] = Faults,
    ) -> None:
        self.shell = shell
        self.host_keys = tuple(host_keys)
        self.authorized = frozenset(key.asbytes() for key in authorized_keys)
        self.ports = dict(ports or {})
        self.faults = faults
        self._host = host
        self._port = port
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self._host, self._port))
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._port = listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._accepting, *self._opening) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*(connection.close() for connection in list(self._connections)))

    @property
    def port(self) -> int:
        return self._port

    @property
    def connections(self) -> int:
        """The number of open SSH connections."""
        return len(self._connections)

    async def drop_connections(self) -> None:
        """Cuts all connections, as a router or a reboot does. The port stays open."""
        await asyncio.gather(*(connection.close() for connection in list(self._connections)))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            task = asyncio.create_task(self._open(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            faults = self.faults()
            if faults.ssh_hang:
                await asyncio.Event().wait()
            if faults.ssh_delay_s > 0:
                await asyncio.sleep(faults.ssh_delay_s)
            connection = _Connection(self, sock)
        except BaseException:
            sock.close()
            raise
        self._connections.add(connection)
        connection.start()

    def remove_connection(self, connection: _Connection) -> None:
        self._connections.discard(connection)


class _Connection:
    """One client's connection: its transport, and its channels and commands on the event loop."""

    def __init__(self, server: SimSshServer, sock: socket.socket) -> None:
        self.server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._targets: dict[int, socket.socket] = {}
        self._channels: dict[int, paramiko.Channel] = {}
        self._waiting: dict[int, tuple[paramiko.Channel, str]] = {}
        self._forwards: set[ForwardedChannel] = set()
        self._commands: set[asyncio.Task[None]] = set()
        self._closed = False
        sock.setblocking(True)
        self._transport = _Transport(sock, self)

    def start(self) -> None:
        self._transport.local_version = BANNER
        for key in self.server.host_keys:
            self._transport.add_server_key(key)
        # With an event, the call does not block. No code waits for this event.
        self._transport.start_server(event=_IgnoredEvent(), server=_Policy(self))  # type: ignore[arg-type]

    async def close(self) -> None:
        self._end()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes paramiko's thread: ``close`` waits for this thread
        await asyncio.to_thread(self._transport.close)
        self._sock.close()

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        for forward in list(self._forwards):
            forward.close()
        for task in self._commands:
            task.cancel()
        for sock in self._targets.values():
            sock.close()
        self.server.remove_connection(self)

    # -- called by paramiko's thread ---------------------------------------------------------------------------------

    def post(self, callback: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, but the client has not
            self._loop.call_soon_threadsafe(callback, *arguments)

    def transport_ended(self) -> None:
        self.post(self._end)

    def open_target(self, channel_id: int, host: str, port: int) -> int:
        """Connects to the target of a new channel. Like sshd, this confirms the channel only after the connect."""
        if self.server.faults().ssh_no_forwarding or host not in (*_LOOPBACK, self.server.shell.profile.hostname):
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        real_port = self.server.ports.get(port)
        if real_port is None:
            return OPEN_FAILED_CONNECT_FAILED
        try:
            self._targets[channel_id] = socket.create_connection(("127.0.0.1", real_port), timeout=CONNECT_TIMEOUT_S)
        except OSError:
            return OPEN_FAILED_CONNECT_FAILED
        return OPEN_SUCCEEDED

    def channel_opened(self, channel: paramiko.Channel) -> None:
        # paramiko holds channels only by weak references: without this dictionary, the garbage collector closes them.
        self._channels = {number: opened for number, opened in self._channels.items() if not opened.closed}
        self._channels[channel.get_id()] = channel
        sock = self._targets.pop(channel.get_id(), None)
        if sock is not None:
            self.post(self._forward, channel, sock)

    def command_requested(self, channel: paramiko.Channel, command: str) -> None:
        """Starts the command after the reply to its request: the reply must come before the command's output. If the
        client wants no reply, there is none, so the command starts after a short delay."""
        self._waiting[channel.get_id()] = (channel, command)
        self.post(self._loop.call_later, NO_REPLY_DELAY_S, self._start_command, channel.get_id())

    def reply_sent(self) -> None:
        for channel_id in list(self._waiting):
            self.post(self._start_command, channel_id)

    # -- on the event loop -------------------------------------------------------------------------------------------

    def _forward(self, channel: paramiko.Channel, sock: socket.socket) -> None:
        if self._closed:
            sock.close()
            return
        task = asyncio.ensure_future(self._connect(channel, sock))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _connect(self, channel: paramiko.Channel, sock: socket.socket) -> None:
        sock.setblocking(False)
        forward = ForwardedChannel(channel, self._forwards.discard)
        self._forwards.add(forward)
        try:
            await self._loop.create_connection(lambda: forward, sock=sock)
        except BaseException:
            forward.close()
            sock.close()
            raise

    def _start_command(self, channel_id: int) -> None:
        channel, command = self._waiting.pop(channel_id, (None, ""))
        if channel is None or self._closed:
            return
        task = asyncio.ensure_future(self._run(channel, command))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _run(self, channel: paramiko.Channel, command: str) -> None:
        terminal = _ChannelTerminal(channel)
        close_watch = asyncio.ensure_future(terminal.wait_closed())
        command_task = asyncio.ensure_future(self.server.shell.run(command, terminal))
        try:
            await asyncio.wait((command_task, close_watch), return_when=asyncio.FIRST_COMPLETED)
            if command_task.done() and command_task.exception() is None:
                await terminal.finish(command_task.result())
        finally:
            command_task.cancel()
            close_watch.cancel()
            await asyncio.gather(command_task, close_watch, return_exceptions=True)
            terminal.close()


class _ChannelTerminal:
    """A session channel as a command's standard streams."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._io = ChannelIo(channel, self._add_input)

    def _add_input(self, data: bytes) -> None:
        self._input.put_nowait(data)
        self._io.pause()  # bytes that the command does not read fill the channel's window

    async def read(self) -> bytes:
        if self._input.empty():
            self._io.resume()
        data = await self._input.get()
        if not data:
            self._input.put_nowait(b"")
        return data

    async def write(self, data: bytes, *, error: bool = False) -> None:
        if not self._io.write(data, error=error):
            await self._io.wait_drained()

    async def wait_closed(self) -> None:
        """Waits until the client closes the channel. paramiko reports this only to a reader, and a command may not
        read."""
        while not self._io.closed:  # noqa: ASYNC110  # paramiko has no event for it
            await asyncio.sleep(0.05)

    async def finish(self, status: int) -> None:
        await self._io.wait_flushed()
        if not self._io.closed:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self._channel.send_exit_status(status)

    def close(self) -> None:
        self._io.close()


class _Policy(paramiko.ServerInterface):
    """Decides what the client may do. paramiko calls it in its thread."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._server = connection.server

    def get_allowed_auths(self, username: str) -> str:
        del username
        return "publickey,password" if self._server.shell.profile.password is not None else "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        is_authorized = username == self._server.shell.profile.user and key.asbytes() in self._server.authorized
        return AUTH_SUCCESSFUL if is_authorized and not self._server.faults().ssh_refuse_key else AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        profile = self._server.shell.profile
        is_correct = profile.password is not None and username == profile.user and password == profile.password
        return AUTH_SUCCESSFUL if is_correct else AUTH_FAILED

    def check_global_request(self, kind: str, msg: paramiko.Message) -> bool:
        del msg
        return kind == "keepalive@openssh.com"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        del chanid
        if kind != "session":
            return OPEN_FAILED_UNKNOWN_CHANNEL_TYPE
        return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED if self._server.faults().ssh_no_session else OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        del origin
        return self._connection.open_target(chanid, *destination)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self._connection.command_requested(channel, command.decode("utf-8", "replace"))
        return True

    def check_channel_pty_request(
        self, channel: paramiko.Channel, term: bytes, width: int, height: int, pixelwidth: int, pixelheight: int,
        modes: bytes,
    ) -> bool:  # fmt: skip
        del channel, term, width, height, pixelwidth, pixelheight, modes
        return True


class _Transport(paramiko.Transport):
    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        super().__init__(sock)
        self._connection = connection
        self.daemon = True

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._connection.transport_ended()

    def _queue_incoming_channel(self, channel: paramiko.Channel) -> None:
        # The channel does not go into paramiko's own queue: no code calls ``accept``.
        self._connection.channel_opened(channel)

    def _send_user_message(self, data: paramiko.Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc]
        if data.asbytes()[:1] == cMSG_CHANNEL_SUCCESS:
            self._connection.reply_sent()


class _IgnoredEvent:
    """Takes the place of the ``threading.Event`` that paramiko sets after the handshake."""

    def set(self) -> None:
        pass

    def is_set(self) -> bool:
        return True

    def clear(self) -> None:
        pass
