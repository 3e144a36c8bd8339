"""Commands on a host. Each is a session channel of a paramiko transport, which asyncio reads without a thread."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from gpumesh.errors import ExecError
from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.remote_command import SHELL_TEST_OUTPUT, wrap_killable

READ_BYTES = 32 * 1024
OPEN_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 1.0
TEST_TIMEOUT_S = 3.0
DISCONNECT_TIMEOUT_S = 0.5  # within which paramiko marks a broken connection as ended


async def start_command(transport: paramiko.Transport, command: str, *, posix: bool) -> SessionCommand:
    """Starts ``command`` on the host. ``posix``: it runs under a shell that ends it with its session
    (remote_command.py).

    Raises ``ExecError`` when the host gives no session or does not answer in time.
    """
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            channel = await blocking.run_in_thread(
                _open_session, transport, wrap_killable(command) if posix else command, has_input=posix
            )
    except TimeoutError as error:
        raise ExecError("the host does not start the command") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ExecError(
            "the host gives no session to run a command in", hint="its sshd forbids it, or MaxSessions is reached"
        ) from error
    return SessionCommand(channel, wrapped=posix)


async def has_posix_shell(test: paramiko.Channel | None) -> bool:
    """Whether the host has a POSIX shell, which the output of ``SHELL_TEST`` shows. ``test`` is the session in which
    that command runs; ``None``: the host gave no session."""
    if test is None:
        return False
    process, output = SessionCommand(test), b""
    try:
        with contextlib.suppress(TimeoutError, OSError, ExecError):
            async with asyncio.timeout(TEST_TIMEOUT_S):
                while len(output) < READ_BYTES and (piece := await process.read()) is not None:
                    output += piece[1]
    finally:
        await process.kill()
    return SHELL_TEST_OUTPUT in output.splitlines()  # a host may print a greeting first


def _open_session(transport: paramiko.Transport, command: str, *, has_input: bool) -> paramiko.Channel:
    channel = transport.open_session(timeout=OPEN_TIMEOUT_S)
    try:
        channel.settimeout(OPEN_TIMEOUT_S)
        channel.exec_command(command)
        if not has_input:
            _end_input(channel)  # so that the command does not wait for an input that never comes
        channel.settimeout(0.0)
    except BaseException:
        channel.close()
        raise
    return channel


def _end_input(channel: Any) -> None:
    with channel.lock:
        message = channel._send_eof()
    if message is not None:
        _send_while_open(channel, message)


def _send_while_open(channel: Any, message: paramiko.Message) -> None:
    """Sends ``message``, unless the channel is closed: an sshd ends the whole connection when it gets a message for a
    channel that we have closed.

    paramiko's thread may answer the host's close with our close at any moment. It first marks the channel as closed,
    and it needs ``clear_to_send_lock`` to send. So under that lock, while the channel has no mark, a message is sent
    before the close. (paramiko's own ``shutdown_write`` checks the mark, releases the lock, and then sends.)
    """
    transport = channel.transport
    while transport.active:
        transport.clear_to_send.wait(0.1)  # during a key exchange nothing may be sent
        with transport.clear_to_send_lock:
            if channel.closed:
                return
            if transport.clear_to_send.is_set():
                transport._send_message(message)
                return


class SessionCommand:
    """See ``transport.RemoteCommand``. ``wrapped``: the command runs under ``remote_command.wrap_killable``.

    The descriptor ``_fd`` is a pipe that paramiko keeps readable while output, or its end, waits to be read.
    """

    def __init__(self, channel: paramiko.Channel, *, wrapped: bool = False) -> None:
        self._channel = channel
        self._wrapped = wrapped
        self._fd = channel.fileno()

    @property
    def exit_status(self) -> int | None:
        return self._channel.exit_status if self._channel.exit_status >= 0 else None

    async def read(self) -> tuple[OutputStream, bytes] | None:
        channel = self._channel
        while True:
            # Read before the buffers: if the output has ended now, the buffers hold all the rest.
            output_ended = bool(channel.eof_received) or channel.closed
            if channel.recv_ready():
                return OutputStream.STDOUT, channel.recv(READ_BYTES)
            if channel.recv_stderr_ready():
                return OutputStream.STDERR, channel.recv_stderr(READ_BYTES)
            if output_ended:
                # The exit status comes between the end of the output and the channel's close, or never.
                await blocking.run_in_thread(channel.status_event.wait)
                await self._ensure_connected()
                return None
            await self._wait_readable()

    async def kill(self) -> None:
        if self._channel.closed:
            self._channel.close()  # closes the channel's pipe, which paramiko keeps open for late readers
            return
        with contextlib.suppress(TimeoutError, paramiko.SSHException, EOFError, OSError):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await blocking.run_in_thread(self._channel.close if self._wrapped else self._signal_and_close)

    async def _ensure_connected(self) -> None:
        """Returns if the command has ended by itself. Raises ExecError if its channel has no exit status because the
        connection broke."""
        transport = self._channel.get_transport()
        if self._channel.exit_status < 0 and not self._channel.eof_received:
            await blocking.run_in_thread(transport.join, DISCONNECT_TIMEOUT_S)
            if not transport.is_active():
                raise ExecError("the connection broke")

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_reader(self._fd)

    def _signal_and_close(self) -> None:
        """Asks sshd to kill the command, and closes the channel.

        sshd passes the signal on since OpenSSH 7.9, but not for a login of root. Otherwise the command only finds its
        output closed. This is not for a wrapped command: the signal would end the shell that watches its input.
        """
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)
        message.add_string("KILL")
        _send_while_open(self._channel, message)
        self._channel.close()
