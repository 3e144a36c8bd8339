"""Runs commands on a host: each is a session channel of a paramiko transport, which asyncio reads without a thread."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

from gpumesh.errors import ExecError, SessionRefused
from gpumesh.text.printable import printable
from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.remote_commands.remote_command import SHELL_TEST_OUTPUT, wrap_killable

READ_BYTES = 32 * 1024  # the most that one ``read`` returns
OPEN_TIMEOUT_S = 10.0  # the time for the host to give a session and to start the command
KILL_TIMEOUT_S = 1.0  # the time to send the signal and the close of the channel
WINDOW_POLL_S = 0.05  # the pause before the next try to send input to a command that took none
DISCONNECT_TIMEOUT_S = 0.5  # paramiko marks a broken connection as ended within this time


async def start_command(
    transport: paramiko.Transport, command: str, *, posix: bool, has_input: bool = False
) -> SessionCommand:
    """Starts ``command`` on the host. ``posix``: under a shell that ends the command when its session ends
    (remote_command.py). ``has_input``: the command reads our input, and ends by itself when its input ends.

    Raises ``SessionRefused`` when the host gives no session, and ``ExecError`` when it does not answer in time.
    """
    wrapped = posix and not has_input
    ends_with_input = wrapped or has_input
    try:
        command_line = wrap_killable(command) if wrapped else command
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            channel = await blocking.run_in_thread(_open_session, transport, command_line, has_input=ends_with_input)
    except TimeoutError as error:
        raise ExecError("the host does not start the command") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        # The text of paramiko's ChannelException is not the host's, and misleads.
        reason = "open failed" if isinstance(error, paramiko.ChannelException) else printable(str(error), 120)
        raise SessionRefused(
            f"the host gives no session to run a command in{f' ({reason})' if reason else ''}",
            hint="its sshd forbids it, or MaxSessions is reached",
        ) from error
    return SessionCommand(channel, ends_with_input=ends_with_input)


async def has_posix_shell(test: paramiko.Channel | None) -> bool:
    """Whether the host has a POSIX shell, by the output of the command ``SHELL_TEST``.

    ``test`` is the session in which that command runs; ``None``: the host gave no session. False also when the test
    fails. Has no deadline, because a login shell may be slow.
    """
    if test is None:
        return False
    command = SessionCommand(test)
    output = b""
    try:
        with contextlib.suppress(TimeoutError, OSError, ExecError):
            while len(output) < READ_BYTES:  # a limit for a host that prints without end
                piece = await command.read()
                if piece is None:
                    break
                _stream, data = piece
                output += data
    finally:
        await command.kill()
    return SHELL_TEST_OUTPUT in output.splitlines()  # a host may print a greeting first


def _open_session(transport: paramiko.Transport, command: str, *, has_input: bool) -> paramiko.Channel:
    """Opens a session, starts ``command`` in it, and returns the session's channel, set to non-blocking.

    Blocks until the host has started the command. ``has_input``: the command's input stays open.
    """
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
    """Tells the host that the session's input has ended."""
    with channel.lock:
        message = channel._send_eof()  # returns the message without sending it; ``None``: it was sent already
    if message is not None:
        _send_while_open(channel, message)


def _send_while_open(channel: Any, message: paramiko.Message) -> None:
    """Sends ``message``, unless the channel is closed.

    An sshd ends the whole connection when it gets a message for a channel that we have closed. At any moment paramiko's
    thread may send our close, as the answer to the host's close. For this it first marks the channel as closed
    (``closed``), and then takes ``clear_to_send_lock`` to send. So this function holds that lock while it checks the
    mark and sends: if the channel has no mark yet, the close is sent after ``message``. (paramiko's own
    ``shutdown_write`` checks the mark, releases the channel's lock, and then sends.)
    """
    transport = channel.transport
    while transport.active:
        transport.clear_to_send.wait(0.1)  # during a key exchange nothing may be sent
        with transport.clear_to_send_lock:
            if channel.closed:
                return
            # Otherwise the wait was too short, or another key exchange has begun: try again.
            if transport.clear_to_send.is_set():
                transport._send_message(message)
                return


def close_channel(channel: Any) -> None:
    """Closes a channel whose pipe was made (``fileno``).

    ``Channel.close`` closes both ends of the pipe. Output that comes meanwhile is written to the pipe by paramiko's
    thread, which ends the whole connection at an error (EPIPE, for a command that writes without end). So first the
    buffers forget the pipe: ``set_event`` waits for a write that is under way.
    """
    for buffer in (channel.in_buffer, channel.in_stderr_buffer):
        buffer.set_event(blocking.ThreadEvent())
    channel.close()


class SessionCommand:
    """A command on the host; see ``transport.RemoteCommand``. ``ends_with_input``: the command ends when its
    session's input ends.

    The descriptor ``_fd`` is a pipe that paramiko keeps readable while output, or its end, waits to be read.
    """

    def __init__(self, channel: paramiko.Channel, *, ends_with_input: bool = False) -> None:
        self._channel = channel
        self._ends_with_input = ends_with_input
        self._fd = channel.fileno()

    @property
    def exit_status(self) -> int | None:
        status = self._channel.exit_status
        return status if status >= 0 else None  # paramiko has -1 until a status comes

    async def read(self) -> tuple[OutputStream, bytes] | None:
        """The next piece of output; ``None`` at its end, when the exit status is known too."""
        channel = self._channel
        while True:
            # Looked up before the buffers: if the output has ended now, the buffers hold all the rest.
            output_ended = bool(channel.eof_received) or channel.closed
            if channel.recv_ready():
                return OutputStream.STDOUT, channel.recv(READ_BYTES)
            if channel.recv_stderr_ready():
                return OutputStream.STDERR, channel.recv_stderr(READ_BYTES)
            if output_ended:
                # The exit status comes between the end of the output and the channel's close, or never. The close sets
                # the event too, so the wait always ends.
                await blocking.run_in_thread(channel.status_event.wait)
                await self._ensure_connected()
                return None
            await self._wait_readable()

    async def write(self, data: bytes) -> None:
        """Writes to the command's input. If the channel is closed, drops the data."""
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):  # closed, which ``read`` reports
            while data and not self._channel.closed:
                try:
                    # In a thread, because paramiko waits here for the end of a key exchange.
                    sent = await blocking.run_in_thread(self._channel.send, data)
                except TimeoutError:  # the host takes no more now
                    await asyncio.sleep(WINDOW_POLL_S)
                else:
                    data = data[sent:]

    async def kill(self) -> None:
        """Ends the command and closes its channel."""
        if self._channel.closed:
            close_channel(self._channel)  # closes the channel's pipe, which paramiko keeps open for late readers
            return
        with contextlib.suppress(TimeoutError, paramiko.SSHException, EOFError, OSError):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                # The close ends the command's input. A command that does not end with its input needs a signal.
                await blocking.run_in_thread(self._close if self._ends_with_input else self._signal_and_close)

    async def _ensure_connected(self) -> None:
        """Raises ExecError if the connection broke before the command ended.

        A command that has an exit status, or whose output ended with EOF, has ended by itself.
        """
        transport = self._channel.get_transport()
        if self._channel.exit_status < 0 and not self._channel.eof_received:
            # When a connection breaks, paramiko closes the channels a moment before it marks the transport as ended.
            await blocking.run_in_thread(transport.join, DISCONNECT_TIMEOUT_S)
            if not transport.is_active():
                raise ExecError("the connection broke")

    async def _wait_readable(self) -> None:
        """Waits until there is output to read, or its end."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def set_ready() -> None:  # may be called again before the reader is removed
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._fd, set_ready)
        try:
            await ready
        finally:
            loop.remove_reader(self._fd)

    def _close(self) -> None:
        close_channel(self._channel)

    def _signal_and_close(self) -> None:
        """Asks sshd to kill the command, and closes the channel.

        sshd passes the signal on since OpenSSH 7.9, but not for a login of root. Where sshd does not pass it on, the
        command only finds its output closed. Not for a command that ends with its input: the signal would end the
        shell that watches the input, and the command could run on.
        """
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)  # no answer wanted, as RFC 4254 demands for a signal
        message.add_string("KILL")
        _send_while_open(self._channel, message)
        close_channel(self._channel)
