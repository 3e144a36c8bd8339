"""The supervisor's link to one worker: sends commands and pings, and handles the worker's answers and reports."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable

from gpumesh.errors import ExecError, OutputOverflow, TunnelDown, TunnelError, tunnel_error_from_code
from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream, Prompter
from gpumesh.tunnels.lifecycle import Cause
from gpumesh.tunnels.transport import ConnectionInfo
from gpumesh.tunnels.workers.linked_streams import LinkedProgram, LinkedShell, PendingCommand
from gpumesh.tunnels.workers.protocol import (
    Close,
    Credit,
    Done,
    Failed,
    ForwardFailed,
    FromWorker,
    Input,
    InputTaken,
    Kill,
    Lost,
    OutputPiece,
    PeerRefused,
    Ping,
    Pong,
    Prompt,
    Reply,
    StartCommand,
)
from gpumesh.tunnels.workers.worker_pool import WorkerHandle

STREAM_LIMIT_BYTES = 64 << 20  # a streamed command is ended when more of its output (as base64) waits for the reader
DEADLINE_SLACK_S = 2.0  # the worker ends a command at its deadline; this is the extra time for the worker's report
PING_SLACK_S = 0.25  # the extra time for the worker's report of a ping
PROGRAM_WINDOW_BYTES = 1 << 20  # of a program's output, which wait for the reader; then the program has to wait
_OVERFLOW = "its output came faster than it was read"
SHELL_LIMIT_BYTES = 4 << 20  # the same for a shell, whose output is read only while one of our command lines runs
KILL_TIMEOUT_S = 2.0  # the time to send ``Kill``


def cause_from_error(error: TunnelError) -> Cause:
    """The failure ``error`` in the form of the lifecycle. ``error_from_cause`` is the reverse."""
    return Cause(error.code, error.message, error.hint, needs_person=error.needs_person)


def error_from_cause(cause: Cause, node: str) -> TunnelError:
    """The failure ``cause`` as an error, whose type belongs to the cause's code."""
    return tunnel_error_from_code(cause.code, cause.message, hint=cause.hint, node=node)


class WorkerLink:
    """The link to one worker, for the worker's life. ``connected`` is set when the worker is connected.

    ``end_cause`` gets its result when the connection is over. ``open_prompts`` counts the questions that wait for a
    person's answer.
    """

    def __init__(
        self,
        node: str,
        worker: WorkerHandle,
        *,
        prompter: Prompter | None,
        on_connected: Callable[[ConnectionInfo], None],
        on_forward_failed: Callable[[ForwardFailed], None],
        on_peer_refused: Callable[[PeerRefused], None],
    ) -> None:
        self.end_cause: asyncio.Future[Cause] = asyncio.get_running_loop().create_future()
        self.connected = asyncio.Event()
        self.open_prompts = 0
        self._node = node
        self._worker = worker
        self._prompter = prompter
        self._on_connected = on_connected
        self._on_forward_failed = on_forward_failed
        self._on_peer_refused = on_peer_refused
        self._ids = itertools.count(1)
        self._pings: dict[int, asyncio.Future[float | None]] = {}  # the answers that are awaited, by id
        self._commands: dict[int, PendingCommand] = {}  # the commands that run, by id

    def __repr__(self) -> str:
        state = "UP" if self.connected.is_set() else "CONNECTING"
        if self.end_cause.done():
            state = "ENDED"
        return f"<WorkerLink {self._node} {state} {len(self._commands)} commands>"

    def finish(self, cause: Cause) -> None:
        """Marks the connection as over, and ends all pings and commands. A second call keeps the first cause."""
        if not self.end_cause.done():
            self.end_cause.set_result(cause)
        for ping in self._pings.values():
            if not ping.done():
                ping.set_result(None)
        for command in self._commands.values():
            command.end(None)

    def cut(self) -> None:
        """Ends the worker's process, and with it the connection, as a crash would. ``receive_messages`` notices it."""
        self._worker.kill()

    async def receive_messages(self, group: asyncio.TaskGroup) -> None:
        """Handles the worker's messages until no more come. Then the connection is over, and this calls ``finish``.

        Each question to a person gets a task in ``group``, so that other messages do not wait for the answer.
        """
        while True:
            try:
                message = await self._worker.receive()
            except ValueError as error:
                self.finish(Cause("tunnel-lost", f"the tunnel's process of {self._node} said something odd: {error}"))
                return
            if message is None:
                self.finish(Cause("tunnel-lost", f"the tunnel's process of {self._node} ended unexpectedly"))
                return
            self._handle_message(message, group)

    def _handle_message(self, message: FromWorker, group: asyncio.TaskGroup) -> None:
        """Passes one message of the worker on to the code that waits for it. ``group``: see ``receive_messages``."""
        match message:
            case ConnectionInfo():
                self.connected.set()
                self._on_connected(message)
            case Failed() | Lost():
                error = tunnel_error_from_code(message.code, message.message, hint=message.hint, node=self._node)
                self.finish(cause_from_error(error))
            case Pong(id=ping_id, rtt_ms=rtt_ms):
                ping = self._pings.get(ping_id)
                if ping is not None and not ping.done():  # otherwise the answer came after the ping's time-out
                    ping.set_result(rtt_ms)
            case OutputPiece() | Done():
                self._queue_message(message)
            case InputTaken(id=command_id):
                if command_id in self._commands:
                    self._commands[command_id].inputs_taken += 1
                    self._commands[command_id].input_changed.set()
            case ForwardFailed():
                self._on_forward_failed(message)
            case PeerRefused():
                self._on_peer_refused(message)
            case Prompt():
                group.create_task(self._answer_prompt(message))

    async def _answer_prompt(self, prompt: Prompt) -> None:
        """Asks a person the question, and sends the answer to the worker; without a prompter, the answer ``None``."""
        self.open_prompts += 1
        try:
            answer: str | None = None
            if self._prompter is not None:
                answer = await self._prompter(self._node, prompt.text, echo=prompt.echo)
            await self._worker.send(Reply(prompt.id, answer))
        except TunnelDown:
            pass  # the worker has ended; ``receive_messages`` notices that too, and calls ``finish``
        finally:
            self.open_prompts -= 1

    async def ping(self, timeout_s: float) -> float | None:
        """Measures the round trip to the host in ms; ``None``: the host or the worker did not answer within
        ``timeout_s``, or the connection has ended."""
        ping_id = next(self._ids)
        answer: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._pings[ping_id] = answer
        try:
            async with asyncio.timeout(timeout_s + PING_SLACK_S):
                await self._worker.send(Ping(ping_id, timeout_s))
                return await answer
        except (TimeoutError, TunnelDown):  # the worker does not answer in time, or has ended
            return None
        finally:
            del self._pings[ping_id]

    async def close(self, timeout_s: float) -> None:
        """Asks the worker to close, and waits at most ``timeout_s`` for its end. The caller then kills the worker."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._worker.send(Close())
                while await self._worker.receive() is not None:
                    pass
        except (TimeoutError, TunnelDown, ValueError):
            pass  # the worker hangs, has ended, or sent no message: the caller's kill is enough

    # -- commands ----------------------------------------------------------------------------------------------------

    async def run_command(self, command: str, *, timeout_s: float, limit_bytes: int) -> ExecResult:
        """Runs a command on the host, and returns its exit status and at most ``limit_bytes`` of each output stream.

        Raises TunnelDown when there is no connection, and ExecError when the command failed, took too long or was cut
        off.
        """
        request = StartCommand(next(self._ids), command, timeout_s=timeout_s, limit_bytes=limit_bytes)
        output = {OutputStream.STDOUT: bytearray(), OutputStream.STDERR: bytearray()}
        succeeded = False
        try:
            async with asyncio.timeout(timeout_s + DEADLINE_SLACK_S):
                # base64 takes 4/3 of the bytes, so two streams of ``limit_bytes`` take 8/3 of it, and their short last
                # pieces a little more. The limit here is larger, so that only a broken worker exceeds it.
                pending = await self._start_command(request, limit_bytes=4 * limit_bytes + (1 << 20))
                message = await pending.messages.get()
                while isinstance(message, OutputPiece):
                    output[OutputStream(message.stream)] += base64.b64decode(message.data)
                    message = await pending.messages.get()
            succeeded = message is not None and message.error is None
        except TimeoutError as error:
            raise ExecError(f"no end of the command within {timeout_s:g} s on {self._node}", node=self._node) from error
        finally:
            await self.forget_command(request.id, succeeded=succeeded)
        done = self.ensure_succeeded(message)
        stdout, stderr = bytes(output[OutputStream.STDOUT]), bytes(output[OutputStream.STDERR])
        return ExecResult(done.exit_status, stdout, stderr, truncated=done.truncated)

    async def stream_command(self, command: str) -> AsyncGenerator[ExecChunk, None]:
        """Runs a command on the host without a deadline, and yields each piece of its output as it comes.

        Closing the iterator ends the command. Raises as ``run_command``.
        """
        # ``limit_bytes`` has no effect on a stream.
        request = StartCommand(next(self._ids), command, timeout_s=None, limit_bytes=0, stream=True)
        succeeded = False
        try:
            pending = await self._start_command(request, limit_bytes=STREAM_LIMIT_BYTES)
            message = await pending.messages.get()
            while isinstance(message, OutputPiece):
                pending.queued_bytes -= len(message.data)
                yield ExecChunk(OutputStream(message.stream), base64.b64decode(message.data))
                message = await pending.messages.get()
            succeeded = message is not None and message.error is None
            done = self.ensure_succeeded(message)
            yield ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=done.exit_status)
        finally:
            await self.forget_command(request.id, succeeded=succeeded)

    async def open_shell(self, command: str) -> LinkedShell:
        """Starts ``command``, which reads our input, and returns the stream of its input and output. Raises
        TunnelDown."""
        request = StartCommand(next(self._ids), command, timeout_s=None, limit_bytes=0, stream=True, has_input=True)
        try:
            pending = await self._start_command(request, limit_bytes=SHELL_LIMIT_BYTES)
        except BaseException:
            await self.forget_command(request.id, succeeded=False)
            raise
        return LinkedShell(self, request.id, pending)

    async def open_program(self, command: str) -> LinkedProgram:
        """Starts ``command``, which reads our input, as ``Tunnel.open_program`` says. Raises TunnelDown."""
        request = StartCommand(
            next(self._ids), command, timeout_s=None, limit_bytes=0, stream=True, has_input=True,
            window_bytes=PROGRAM_WINDOW_BYTES,
        )  # fmt: skip
        try:
            # base64 takes 4/3 of the bytes. The limit is larger, so that only a broken worker exceeds it.
            pending = await self._start_command(request, limit_bytes=2 * PROGRAM_WINDOW_BYTES)
        except BaseException:
            await self.forget_command(request.id, succeeded=False)
            raise
        return LinkedProgram(self, request.id, pending)

    async def send_input(self, command_id: int, data: bytes) -> None:
        """Sends ``data`` to the input of a command of ``open_shell`` or ``open_program``. Raises TunnelDown."""
        await self._worker.send(Input(command_id, base64.b64encode(data).decode("ascii")))

    async def send_credit(self, command_id: int, count: int) -> None:
        """Lets the worker send ``count`` more bytes of a program's output. Does nothing when the worker has ended."""
        with contextlib.suppress(TunnelDown):  # the next message of the program tells of the end
            await self._worker.send(Credit(command_id, count))

    async def _start_command(self, request: StartCommand, limit_bytes: int) -> PendingCommand:
        """Sends the request, and returns the command whose ``messages`` get the answers. At most ``limit_bytes`` of its
        output may wait there. Raises TunnelDown.

        The caller must call ``forget_command`` in the end, also after an error: until then the command stays in
        ``_commands``.
        """
        pending = self._commands[request.id] = PendingCommand(limit_bytes)
        self.ensure_connected()
        await self._worker.send(request)
        return pending

    def ensure_connected(self) -> None:
        """Raises TunnelDown when the connection has ended."""
        if self.end_cause.done():
            raise TunnelDown(f"the tunnel of {self._node} is down", node=self._node)

    def _queue_message(self, message: OutputPiece | Done) -> None:
        """Puts a message into its command's queue. Ends the command with an error if too much output waits there."""
        command = self._commands.get(message.id)
        if command is None:
            return  # the caller does not wait for the command any more
        if isinstance(message, OutputPiece):
            command.queued_bytes += len(message.data)
            if command.queued_bytes > command.limit_bytes:
                command.end(Done(message.id, None, error=_OVERFLOW))
                del self._commands[message.id]
                return
            command.messages.put_nowait(message)
        else:
            command.end(message)

    def ensure_succeeded(self, done: Done | None) -> Done:
        """Returns ``done``, a command's last message. ``None``: the end of the connection has cut the command off.

        Raises ExecError when the command failed or was cut off.
        """
        if done is None:
            reason = self.end_cause.result().message if self.end_cause.done() else "the tunnel closed"
            raise ExecError(f"the command was cut off on {self._node}: {reason}", node=self._node)
        if done.error is not None:
            error_class = OutputOverflow if done.error == _OVERFLOW else ExecError
            raise error_class(f"the command failed on {self._node}: {done.error}", hint=done.hint, node=self._node)
        return done

    async def forget_command(self, command_id: int, *, succeeded: bool) -> None:
        """Removes the command from ``_commands``. A command that has not succeeded may still run, so it is killed."""
        self._commands.pop(command_id, None)
        connection_ended = self.end_cause.done()
        if succeeded or connection_ended:
            return
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await self._worker.send(Kill(command_id))
        except TunnelDown:
            pass  # the host ends the commands of a connection that has ended
        except TimeoutError:
            pass  # the worker reads nothing: it hangs, the next ping fails, and the supervisor ends the connection
