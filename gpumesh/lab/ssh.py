"""The SSH server of a simulated host, on paramiko: it authenticates clients, forwards ports, answers a few commands.

It runs in this process. shell.py answers the commands: no program is ever run. The server never connects to an address
other than loopback.

paramiko runs one thread for each connection. Our functions in this thread only make decisions, connect to loopback, or
post to the event loop; the event loop does all other work. paramiko has no call-back for an accepted channel. So its
private methods ``_queue_incoming_channel`` and ``_send_user_message`` are extended: tests/lab/test_ssh.py fails if a
new version of paramiko changes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import paramiko
from paramiko.common import (
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_SUCCESS,
)

from gpumesh.lab.channels import ChannelStreams, ForwardedChannel
from gpumesh.lab.profile import Faults
from gpumesh.lab.reverse_ports import LOOPBACK_NAMES, ReversePorts
from gpumesh.lab.shell import SimShell
from gpumesh.lab.ssh_policy import ClientPolicy

BANNER = "SSH-2.0-OpenSSH_9.6_gpumesh_lab"
CONNECT_TIMEOUT_S = 5.0  # for a connect to loopback, which takes no time unless the target hangs
NO_REPLY_DELAY_S = 0.02  # seconds before the start of a command whose request wants no reply


class SimSshServer:
    """Listens on a port and serves SSH clients. An async context manager; ``port`` is valid from its start to its end.

    ``ports`` maps the ports that a client names in a port forwarding to real ports on loopback; all other ports refuse
    connections. ``faults`` is called for each connection, login and channel.
    """

    def __init__(
        self,
        shell: SimShell,
        *,
        host_keys: Sequence[paramiko.PKey],
        authorized_keys: Sequence[paramiko.PKey] = (),
        ports: dict[int, int] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        faults: Callable[[], Faults] = Faults,
    ) -> None:
        self.shell = shell
        self.host_keys = tuple(host_keys)
        self.authorized = frozenset(key.asbytes() for key in authorized_keys)
        self.ports = {} if ports is None else ports  # the shell reads the same dictionary
        self.faults = faults
        self._host = host
        self._port = port
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()
        self._open_tasks: set[asyncio.Task[None]] = set()  # one for each accepted client, until its SSH begins

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self._host, self._port))
            listener.listen(1024)  # clients that may wait to be accepted: many tunnels may connect at once
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._port = listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(listener, self._accept_client, listener)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for task in self._open_tasks:
            task.cancel()
        await asyncio.gather(*self._open_tasks, return_exceptions=True)
        await self.drop_connections()

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

    def _accept_client(self, listener: socket.socket) -> None:
        """Accepts one client, and starts a task for it. The event loop calls this while a client waits: a task with
        ``loop.sock_accept`` would lose a client that it has accepted in the same turn in which it is cancelled."""
        try:
            sock, _address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has gone again
            return
        task = asyncio.create_task(self._open_connection(sock))
        self._open_tasks.add(task)
        task.add_done_callback(partial(self._open_task_ended, sock))

    def _open_task_ended(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        """Closes the client's socket if the task was cancelled: perhaps before its first line ran."""
        self._open_tasks.discard(task)
        if task.cancelled():
            sock.close()

    async def _open_connection(self, sock: socket.socket) -> None:
        """Starts SSH on the client's socket, later or never if the faults say so."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            faults = self.faults()
            if faults.ssh_hang:
                await asyncio.Event().wait()  # waits until the server ends, which cancels this task
            if faults.ssh_delay_s > 0:
                await asyncio.sleep(faults.ssh_delay_s)
            connection = Connection(self, sock)
        except BaseException:  # a cancellation too: without a ``Connection``, no other code closes the socket
            sock.close()
            raise
        self._connections.add(connection)
        connection.start()

    def remove_connection(self, connection: Connection) -> None:
        self._connections.discard(connection)


class Connection:
    """One client's SSH connection: paramiko's transport, and its channels and commands on the event loop."""

    def __init__(self, server: SimSshServer, sock: socket.socket) -> None:
        self.server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        # The keys of these three are paramiko's channel numbers.
        self._channels: dict[int, paramiko.Channel] = {}
        # Connected, but their channel is not open yet. Only paramiko's thread uses this dictionary.
        self._target_sockets: dict[int, socket.socket] = {}
        self._waiting_commands: dict[int, tuple[paramiko.Channel, str]] = {}  # requested, but not started yet
        self._forwards: set[ForwardedChannel] = set()  # the forwarded channels that are open
        self.reverse_ports = ReversePorts(server.ports, self)
        self._tasks: set[asyncio.Task[None]] = set()  # the commands that run, and the forwards that start
        self._closed = False
        sock.setblocking(True)
        self._transport = _Transport(sock, self)

    def start(self) -> None:
        """Starts paramiko's thread, which does the handshake and then calls the methods below."""
        self._transport.local_version = BANNER
        for key in self.server.host_keys:
            self._transport.add_server_key(key)
        # Without an event, the call would block until the handshake is complete. No code waits for this event.
        self._transport.start_server(event=_IgnoredEvent(), server=ClientPolicy(self))  # type: ignore[arg-type]

    async def close(self) -> None:
        """Ends the connection, from the server's side. On return, paramiko's thread has ended."""
        self._end_channels()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes paramiko's thread: ``close`` waits for this thread
        await asyncio.to_thread(self._transport.close)
        await asyncio.to_thread(self._transport.join)  # paramiko's ``close`` does not wait for a thread that connects
        self._sock.close()

    def _end_channels(self) -> None:
        """Closes all forwards and cancels all commands, and takes the connection out of the server's set."""
        if self._closed:
            return
        self._closed = True
        self.reverse_ports.close()
        for forward in list(self._forwards):
            forward.close()
        for task in self._tasks:
            task.cancel()
        self.server.remove_connection(self)

    # -- called by paramiko's thread ---------------------------------------------------------------------------------

    def post(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Makes the event loop call ``callback(*arguments)`` soon."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, but the client has not
            self._loop.call_soon_threadsafe(callback, *arguments)

    def transport_ended(self) -> None:
        """Ends the channels, and closes the sockets of targets whose channel never opened: the SSH connection has
        ended, from any side."""
        for target_socket in self._target_sockets.values():
            target_socket.close()
        self._target_sockets.clear()
        self.post(self._end_channels)

    def open_target(self, channel_id: int, host: str, port: int) -> int:
        """Connects to the target of a new direct-tcpip channel, and returns SSH's code for success or the failure.

        ``host`` and ``port`` are those that the client names. Only names of this host are allowed. The client learns
        that its channel is open only after the connect, as with sshd.
        """
        is_own_name = host in (*LOOPBACK_NAMES, self.server.shell.profile.hostname)
        if self.server.faults().ssh_no_forwarding or not is_own_name:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        real_port = self.server.ports.get(port)
        if real_port is None:
            return OPEN_FAILED_CONNECT_FAILED
        try:
            target_socket = socket.create_connection(("127.0.0.1", real_port), timeout=CONNECT_TIMEOUT_S)
        except OSError:  # nothing listens there, or it does not accept in time
            return OPEN_FAILED_CONNECT_FAILED
        self._target_sockets[channel_id] = target_socket
        return OPEN_SUCCEEDED

    def channel_opened(self, channel: paramiko.Channel) -> None:
        """Keeps the channel, and starts the forwarding of bytes if it has a target."""
        # paramiko holds channels only by weak references: without this dictionary, the garbage collector closes them.
        self._channels = {number: earlier for number, earlier in self._channels.items() if not earlier.closed}
        self._channels[channel.get_id()] = channel
        target_socket = self._target_sockets.pop(channel.get_id(), None)
        if target_socket is not None:
            self.post(self._start_forward, channel, target_socket)

    def command_requested(self, channel: paramiko.Channel, command: str) -> None:
        """Lets the command start as soon as the reply to its request is sent: the reply must come before the output.

        If the client wants no reply, the server sends none, so the command starts after a short delay.
        """
        self._waiting_commands[channel.get_id()] = (channel, command)
        self.post(self._loop.call_later, NO_REPLY_DELAY_S, self._start_command, channel.get_id())

    def reply_sent(self) -> None:
        """Starts the commands that wait for the reply to their request."""
        for channel_id in list(self._waiting_commands):
            self.post(self._start_command, channel_id)

    # -- on the event loop -------------------------------------------------------------------------------------------

    def connect_to_client(self, port: int, sock: socket.socket, peer: tuple[str, int]) -> None:
        """Forwards ``sock``, which a program of the host has connected to its ``port``, to the client."""
        if self._closed:
            sock.close()
            return
        task = self._start_task(self._forward_to_client(port, sock, peer))
        task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)

    async def _forward_to_client(self, port: int, sock: socket.socket, peer: tuple[str, int]) -> None:
        try:
            # In a thread, because it waits for the client's answer.
            channel = await asyncio.to_thread(self._transport.open_forwarded_tcpip_channel, peer, ("127.0.0.1", port))
        except (paramiko.SSHException, EOFError, OSError):  # the client refuses it, or has gone
            sock.close()
            return
        await self._forward(channel, sock)

    def _start_forward(self, channel: paramiko.Channel, target_socket: socket.socket) -> None:
        """Starts to pass bytes between the channel and the socket of its target, unless the connection has ended."""
        if self._closed:
            target_socket.close()
            return
        task = self._start_task(self._forward(channel, target_socket))
        # The task may be cancelled before its first line runs, so it cannot close the socket itself.
        task.add_done_callback(lambda task: target_socket.close() if task.cancelled() else None)

    async def _forward(self, channel: paramiko.Channel, target_socket: socket.socket) -> None:
        """Joins the channel and the socket: from now on, the event loop passes bytes between the two."""
        target_socket.setblocking(False)
        forward = ForwardedChannel(channel, self._forwards.discard)
        self._forwards.add(forward)
        try:
            await self._loop.create_connection(lambda: forward, sock=target_socket)
        except BaseException:
            forward.close()
            target_socket.close()
            raise

    def _start_command(self, channel_id: int) -> None:
        """Starts the channel's command, unless it has started already: a reply and a timer both call this."""
        channel, command = self._waiting_commands.pop(channel_id, (None, ""))
        if channel is None or self._closed:  # ``None``: the command has started already
            return
        self._start_task(self._run_command(channel, command))

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs the coroutine until it or the connection ends. Returns its task."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run_command(self, channel: paramiko.Channel, command: str) -> None:
        """Runs the command, sends its exit status, and closes the channel. Stops early if the client closes it."""
        streams = ChannelStreams(channel)
        close_watch = asyncio.ensure_future(streams.wait_closed())
        command_task = asyncio.ensure_future(self.server.shell.run(command, streams))
        try:
            await asyncio.wait((command_task, close_watch), return_when=asyncio.FIRST_COMPLETED)
            # An exception: the client has closed the channel, or the lab has a bug. There is no status to send then.
            if command_task.done() and command_task.exception() is None:
                await streams.finish(command_task.result())
        finally:
            command_task.cancel()
            close_watch.cancel()
            await asyncio.gather(command_task, close_watch, return_exceptions=True)
            streams.close()


class _Transport(paramiko.Transport):
    """paramiko's side of one connection. It reports new channels, sent replies and its end to the ``Connection``."""

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        super().__init__(sock)
        self._connection = connection
        self.daemon = True  # the connection's thread must not keep the process alive

    def run(self) -> None:
        """Serves the connection until it ends. This is the whole life of the connection's thread."""
        try:
            super().run()
        finally:
            self._connection.transport_ended()

    def _queue_incoming_channel(self, channel: paramiko.Channel) -> None:
        """Reports a new channel. It does not go into paramiko's own queue, because no code here calls ``accept``."""
        self._connection.channel_opened(channel)

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Sends a message, and reports the reply to a channel's request after it is sent."""
        super()._send_user_message(data)  # type: ignore[misc]
        if data.asbytes()[:1] == cMSG_CHANNEL_SUCCESS:
            self._connection.reply_sent()


class _IgnoredEvent:
    """Takes the place of the ``threading.Event`` that paramiko sets after the handshake: no code waits for it."""

    def set(self) -> None:
        pass
