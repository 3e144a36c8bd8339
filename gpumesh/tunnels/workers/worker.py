"""The worker process: holds the connection of one tunnel to one host, from ``ConnectRequest`` to the connection's end.

The worker and its supervisor exchange the messages of protocol.py over one socket. The worker ends when that socket
ends. The worker never retries: when its connection fails or is lost, the worker reports that and exits.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import gpumesh.tunnels.inprocess.connection  # noqa: F401 - loaded in the zygote, before it forks
from gpumesh.errors import ExecError, SessionRefused, TunnelError
from gpumesh.text.printable import printable
from gpumesh.topology import Target
from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.local_system.peer_users import find_user_name
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.transports import load_connect
from gpumesh.tunnels.workers import protocol
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

if TYPE_CHECKING:
    from gpumesh.tunnels.transport import HostConnection, RemoteCommand

LINE_LIMIT = 4 << 20  # bytes of one JSON line
CHUNK_BYTES = 32 * 1024  # bytes of output in one message
SESSION_TRIES, SESSION_RETRY_S = 20, 0.1  # how often a session is asked for that is about to be free
CLOSE_TIMEOUT_S = 2.0  # the time for a connection to close; the process ends then in any case


def main(control: socket.socket, listeners: Sequence[socket.socket]) -> int:
    """Runs the worker in a freshly forked process and returns the exit status. The caller ends the process without
    clean-up."""
    # paramiko logs texts that a host sends. Without a configuration of logging, these texts would go to stderr.
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").propagate = False
    asyncio.run(Worker(listeners).serve(control))
    return 0


class Program:
    """A program of ``Tunnel.open_program``. ``started`` gets its result when the host has started it."""

    def __init__(self, window_bytes: int) -> None:
        self.started: asyncio.Future[RemoteCommand] = asyncio.get_running_loop().create_future()
        self._credit = window_bytes  # bytes of output that may still be sent
        self._has_credit = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Program {'RUNNING' if self.started.done() else 'STARTING'} credit {self._credit}>"

    def add_credit(self, count: int) -> None:
        self._credit += count
        self._has_credit.set()

    async def take_credit(self, count: int) -> None:
        """Waits until ``count`` bytes of output may be sent: meanwhile no more is read from the host."""
        while self._credit < count:
            self._has_credit.clear()
            await self._has_credit.wait()
        self._credit -= count


class Worker:
    """Handles the supervisor's messages, and sends it the reports of the connection (as its ``ConnectionEvents``)."""

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = listeners
        self._writer: asyncio.StreamWriter | None = None
        # The answers that are awaited, by the number of the prompt.
        self._prompts: dict[int, asyncio.Future[str | None]] = {}
        self._commands: dict[int, asyncio.Task[None]] = {}  # the tasks of the commands that run, by id
        self._shells: dict[int, RemoteCommand] = {}  # the commands with ``has_input`` that run, except programs
        self._programs: dict[int, Program] = {}
        self._report_tasks: set[asyncio.Task[None]] = set()  # they send what the connection reports
        self._setup: ConnectRequest | None = None  # ``None``: the request to connect has not come
        self._connection: HostConnection | None = None

    def __repr__(self) -> str:
        node = "without a node" if self._setup is None else self._setup.node
        state = "UP" if self._connection is not None else "CONNECTING"
        return f"<Worker {node} {state} {len(self._commands)} commands>"

    async def serve(self, control: socket.socket) -> None:
        """Runs until the supervisor sends ``Close`` or closes the socket, or until the connection ends."""
        reader, self._writer = await asyncio.open_unix_connection(sock=control, limit=LINE_LIMIT)
        # SIGTERM comes when the zygote ends. The host then sees the connection end, and that is enough.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
        setup = await self._receive(reader)
        if not isinstance(setup, ConnectRequest):  # the supervisor ended before it sent the request
            return
        self._setup = setup
        async with asyncio.TaskGroup() as group:
            connection_task = group.create_task(self._run_connection(setup))
            await self._handle_messages(reader, group, connection_task)
            # The group waits for its tasks, so all that still run are cancelled.
            connection_task.cancel()
            for task in (*self._commands.values(), *self._report_tasks):
                task.cancel()

    # -- events of the connection ------------------------------------------------------------------------------------

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        """Lets the parent process ask the person at the terminal. ``None`` if no person is there."""
        if self._setup is None or not self._setup.interactive:
            return None
        prompt_id = len(self._prompts)  # no prompt is ever removed, so this number is new
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._prompts[prompt_id] = answer
        await self._send(Prompt(prompt_id, text, echo))
        return await answer

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        if self._writer is not None:
            self._writer.write(protocol.encode_message(ForwardFailed(target, code, message)))

    def report_peer_refused(self, port: int, uid: int) -> None:
        # The user's name is looked up in a task and in a thread: a directory service may take long to answer.
        task = asyncio.create_task(self._send_peer_refused(port, uid))
        self._report_tasks.add(task)
        task.add_done_callback(self._report_tasks.discard)

    async def _send_peer_refused(self, port: int, uid: int) -> None:
        name = await blocking.run_in_thread(find_user_name, uid)
        await self._send(PeerRefused(port, uid, name))

    # -- the connection's life ---------------------------------------------------------------------------------------

    async def _run_connection(self, setup: ConnectRequest) -> None:
        """Connects, waits for the connection's end and reports the cause. Then ``_handle_messages`` stops too."""
        try:
            connection = await load_connect(setup.ssh.transport)(setup, self._listeners, self)
        except TunnelError as error:
            await self._send(Failed(error.code, error.message, error.hint))
            return
        except Exception as error:  # a bug of ours, or a host that breaks the protocol: the user has to see it
            await self._send(Failed(TunnelError.code, f"{type(error).__name__}: {printable(str(error))}"))
            raise  # ends the process; zygote.py prints the traceback
        try:
            await self._send(connection.info)
            self._connection = connection
            lost = await connection.wait_lost()
            await self._send(Lost(lost.code, lost.message, lost.hint))
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await connection.close()

    # -- the supervisor's messages -----------------------------------------------------------------------------------

    async def _receive(self, reader: asyncio.StreamReader) -> protocol.ToWorker | None:
        """Waits for the supervisor's next message; ``None``: the socket has ended, or the line is too long."""
        try:
            line = await reader.readline()
        except (ConnectionError, ValueError):  # ValueError: a line longer than LINE_LIMIT
            return None
        return protocol.decode_message(line) if line.endswith(b"\n") else None  # type: ignore[return-value]

    async def _handle_messages(
        self, reader: asyncio.StreamReader, group: asyncio.TaskGroup, connection_task: asyncio.Task[None]
    ) -> None:
        """Handles messages until the supervisor sends ``Close``, the socket ends, or ``connection_task`` ends."""
        while True:
            receive_task = group.create_task(self._receive(reader))
            await asyncio.wait({receive_task, connection_task}, return_when=asyncio.FIRST_COMPLETED)
            if connection_task.done():
                receive_task.cancel()
                return
            message = receive_task.result()
            match message:
                case None | Close():
                    return
                case Reply(id=prompt_id, text=text):
                    answer = self._prompts.get(prompt_id)
                    if answer is not None and not answer.done():
                        answer.set_result(text)
                case Ping():  # in a task, as commands: other messages do not wait for the host's answer
                    group.create_task(self._ping(message))
                case StartCommand():
                    if message.window_bytes is not None:  # here, so that input that comes next finds it
                        self._programs[message.id] = Program(message.window_bytes)
                    self._commands[message.id] = group.create_task(self._exec(message))
                case Input(id=command_id, data=data):
                    if command_id in self._shells:  # otherwise it has ended
                        group.create_task(self._shells[command_id].write(base64.b64decode(data)))
                    elif command_id in self._programs:
                        group.create_task(self._write_to_program(command_id, base64.b64decode(data)))
                case Credit(id=command_id, bytes=count):
                    if command_id in self._programs:
                        self._programs[command_id].add_credit(count)
                case Kill(id=command_id):
                    if command_id in self._commands:
                        self._commands[command_id].cancel()
                case _:
                    return  # a second ConnectRequest: our supervisor never sends that

    async def _send(self, message: FromWorker) -> None:
        assert self._writer is not None, "``serve`` has not opened the socket"
        with contextlib.suppress(ConnectionError):  # the supervisor is gone: ``_receive`` notices that too, and ends us
            self._writer.write(protocol.encode_message(message))
            await self._writer.drain()

    async def _ping(self, request: Ping) -> None:
        """Measures the round trip, and answers with ``Pong``; without a connection, its ``rtt_ms`` is ``None``."""
        rtt_ms: float | None = None
        if self._connection is not None:
            rtt_ms = await self._connection.ping(request.timeout_s)
        await self._send(Pong(request.id, rtt_ms))

    async def _exec(self, request: StartCommand) -> None:
        """Runs one command. Sends its output, and then, in any case, one ``Done``. A cancel kills the command."""
        if self._connection is None:
            await self._send(Done(request.id, None, error="the tunnel is not up"))
            return
        done = Done(request.id, None, error="stopped")  # sent when this task is cancelled
        try:
            async with asyncio.timeout(request.timeout_s):
                try:
                    done = await self._run_command(self._connection, request)
                except SessionRefused:
                    is_shell = request.has_input and request.id not in self._programs
                    if is_shell or not await self._end_shells():
                        raise
                    done = await self._run_command_when_free(self._connection, request)
        except TimeoutError:
            done = Done(request.id, None, error=f"no end of the command within {request.timeout_s:g} s")
        except ExecError as error:
            done = Done(request.id, None, error=error.message, hint=error.hint)
        finally:
            self._commands.pop(request.id, None)
            if (program := self._programs.pop(request.id, None)) is not None:
                program.started.cancel()  # input that waits for the start is dropped
            await self._send(done)

    async def _write_to_program(self, command_id: int, data: bytes) -> None:
        """Writes to the input of a program, which may be about to start, and reports when the host has the data."""
        command = await self._programs[command_id].started
        await command.write(data)
        await self._send(InputTaken(command_id))

    async def _run_command(self, connection: HostConnection, request: StartCommand) -> Done:
        """Starts the command and sends its output. Returns when it has ended. Raises ExecError."""
        command = await connection.start_command(request.command, has_input=request.has_input)
        try:
            if request.id in self._programs:
                self._programs[request.id].started.set_result(command)
            elif request.has_input:
                self._shells[request.id] = command
            truncated = await self._send_output(command, request)
            return Done(request.id, command.exit_status, truncated)
        finally:
            self._shells.pop(request.id, None)
            await command.kill()

    async def _run_command_when_free(self, connection: HostConnection, request: StartCommand) -> Done:
        """As ``_run_command``, but tries again for a short time while the host gives no session: the session of an
        ended command is free only when the host has noticed the end of the command."""
        for _ in range(SESSION_TRIES - 1):
            try:
                return await self._run_command(connection, request)
            except SessionRefused:
                await asyncio.sleep(SESSION_RETRY_S)
        return await self._run_command(connection, request)

    async def _end_shells(self) -> bool:
        """Ends the shells, so that the host has a session for another command. Returns whether there was
        such a shell. The supervisor starts it again when it needs it."""
        tasks = [self._commands[command_id] for command_id in self._shells]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return bool(tasks)

    async def _send_output(self, command: RemoteCommand, request: StartCommand) -> bool:
        """Reads the command's output until the command ends, and sends it. Returns whether output was cut.

        With ``request.stream``, each piece is sent as it comes, and nothing is cut. Otherwise the first ``limit_bytes``
        of stdout and of stderr are sent at the end; the rest is read and dropped, so that the command can end.
        """
        if request.stream:
            program = self._programs.get(request.id)
            while (piece := await command.read()) is not None:
                stream, data = piece
                if program is not None:
                    await program.take_credit(len(data))
                await self._send(_make_output(request.id, stream, data))
            return False
        collected: dict[OutputStream, bytearray] = {OutputStream.STDOUT: bytearray(), OutputStream.STDERR: bytearray()}
        truncated = False
        while (piece := await command.read()) is not None:
            stream, data = piece
            room = request.limit_bytes - len(collected[stream])
            if len(data) > room:  # this piece does not fit as a whole
                truncated = True
            collected[stream] += data[:room]
        for stream, output in collected.items():
            for start in range(0, len(output), CHUNK_BYTES):
                await self._send(_make_output(request.id, stream, bytes(output[start : start + CHUNK_BYTES])))
        return truncated


def _make_output(command_id: int, stream: OutputStream, data: bytes) -> OutputPiece:
    return OutputPiece(command_id, stream.value, base64.b64encode(data).decode("ascii"))
