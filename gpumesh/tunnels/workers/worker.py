"""A tunnel's own process: one connection to one host, from ``ConnectRequest`` to its end.

It speaks protocol.py with its supervisor over one socket, and ends when that socket does. It knows nothing of
retrying: a connection that failed or was lost is said so, and the process is over.
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
from gpumesh.errors import ExecError, TunnelError
from gpumesh.printable import printable
from gpumesh.topology import Target
from gpumesh.tunnels import blocking
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.local_system.peer_users import find_user_name
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.transports import load_connect
from gpumesh.tunnels.workers import protocol
from gpumesh.tunnels.workers.protocol import (
    Close,
    Done,
    Exec,
    Failed,
    ForwardFailed,
    FromWorker,
    Kill,
    Lost,
    Output,
    PeerRefused,
    Ping,
    Pong,
    Prompt,
    Reply,
)

if TYPE_CHECKING:
    from gpumesh.tunnels.transport import HostConnection, RemoteCommand

LINE_LIMIT = 4 << 20
CHUNK_BYTES = 32 * 1024  # bytes of output in one message
CLOSE_TIMEOUT_S = 2.0


def main(control: socket.socket, listeners: Sequence[socket.socket]) -> int:
    """Called in a freshly forked process; returns its exit status. The caller ends the process without clean-up."""
    # paramiko logs what a host sends, and to stderr when nobody has configured logging.
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").propagate = False
    asyncio.run(Worker(listeners).serve(control))
    return 0


class Worker:
    """``events`` for its connection (see transport.py), and the server of its supervisor's messages."""

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = listeners
        self._writer: asyncio.StreamWriter | None = None
        self._prompts: dict[int, asyncio.Future[str | None]] = {}
        self._commands: dict[int, asyncio.Task[None]] = {}
        self._reports: set[asyncio.Task[None]] = set()
        self._setup: ConnectRequest | None = None

    async def serve(self, control: socket.socket) -> None:
        """Until the supervisor closes, or the connection ends."""
        reader, self._writer = await asyncio.open_unix_connection(sock=control, limit=LINE_LIMIT)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, os._exit, 0)
        first = await self._receive(reader)
        if not isinstance(first, ConnectRequest):
            return
        self._setup = first
        made: asyncio.Future[HostConnection] = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            life = group.create_task(self._live(first, made))
            await self._obey(reader, group, made, life)
            life.cancel()
            for task in (*self._commands.values(), *self._reports):
                task.cancel()

    # -- events of the connection ------------------------------------------------------------------------------------

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        if self._setup is None or not self._setup.interactive:
            return None
        number = len(self._prompts)
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._prompts[number] = answer
        await self._send(Prompt(number, text, echo))
        return await answer

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        if self._writer is not None:
            self._writer.write(protocol.encode_message(ForwardFailed(target, code, message)))

    def report_peer_refused(self, port: int, uid: int) -> None:
        # Not awaited here, nor looked up in this thread: where a directory service knows the names, that may take long.
        naming = asyncio.create_task(self._report_peer(port, uid))
        self._reports.add(naming)
        naming.add_done_callback(self._reports.discard)

    async def _report_peer(self, port: int, uid: int) -> None:
        await self._send(PeerRefused(port, uid, await blocking.run_in_thread(find_user_name, uid)))

    # -- the connection's life ---------------------------------------------------------------------------------------

    async def _live(self, setup: ConnectRequest, made: asyncio.Future[HostConnection]) -> None:
        """Connects, waits for the end of the connection, says why; then nothing more will be obeyed."""
        try:
            connection = await load_connect(setup.ssh.transport)(setup, self._listeners, self)
        except TunnelError as error:
            await self._send(Failed(error.code, error.message, error.hint))
            return
        except Exception as error:  # a fault of ours, or a host that does what no host does: the user must hear of it
            await self._send(Failed(TunnelError.code, f"{type(error).__name__}: {printable(str(error))}"))
            raise
        try:
            await self._send(connection.info)
            made.set_result(connection)
            lost = await connection.wait_lost()
            await self._send(Lost(lost.code, lost.message, lost.hint))
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await connection.close()

    # -- the supervisor's messages -----------------------------------------------------------------------------------

    async def _receive(self, reader: asyncio.StreamReader) -> protocol.ToWorker | None:
        try:
            line = await reader.readline()
        except (ConnectionError, ValueError):
            return None
        return protocol.decode_message(line) if line.endswith(b"\n") else None  # type: ignore[return-value]

    async def _obey(
        self,
        reader: asyncio.StreamReader,
        group: asyncio.TaskGroup,
        made: asyncio.Future[HostConnection],
        life: asyncio.Task[None],
    ) -> None:
        while True:
            receiving = group.create_task(self._receive(reader))
            await asyncio.wait({receiving, life}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                receiving.cancel()
                return
            message = receiving.result()
            match message:
                case None | Close():
                    return
                case Reply(id=number, text=text):
                    answer = self._prompts.get(number)
                    if answer is not None and not answer.done():
                        answer.set_result(text)
                case Ping(id=number, timeout_s=timeout_s):
                    group.create_task(self._ping(made, number, timeout_s))
                case Exec():
                    self._commands[message.id] = group.create_task(self._exec(made, message))
                case Kill(id=number):
                    if number in self._commands:
                        self._commands[number].cancel()
                case _:
                    return  # a second Setup: not a supervisor of ours

    async def _send(self, message: FromWorker) -> None:
        assert self._writer is not None
        with contextlib.suppress(ConnectionError):  # the supervisor has gone: our reader sees it too, and ends all
            self._writer.write(protocol.encode_message(message))
            await self._writer.drain()

    async def _ping(self, made: asyncio.Future[HostConnection], number: int, timeout_s: float) -> None:
        rtt_ms = await made.result().ping(timeout_s) if made.done() else None
        await self._send(Pong(number, rtt_ms))

    async def _exec(self, made: asyncio.Future[HostConnection], order: Exec) -> None:
        """Runs one command; sends its ``Output`` and, whatever happens, one ``Done``. Cancelled: kills it."""
        if not made.done():
            await self._send(Done(order.id, None, error="the tunnel is not up"))
            return
        running: RemoteCommand | None = None
        truncated = False
        done = Done(order.id, None, error="stopped")
        try:
            async with asyncio.timeout(order.timeout_s):
                running = await made.result().start_command(order.command)
                truncated = await self._pass_on(running, order)
            done = Done(order.id, running.exit_status, truncated)
        except TimeoutError:
            done = Done(order.id, None, truncated, error=f"no end of the command within {order.timeout_s:g} s")
        except ExecError as error:
            done = Done(order.id, None, error=error.message)
        finally:
            self._commands.pop(order.id, None)
            if running is not None:
                await running.kill()
            await self._send(done)

    async def _pass_on(self, running: RemoteCommand, order: Exec) -> bool:
        """True when output beyond ``limit_bytes`` (of each stream) was left out; a ``stream`` has no limit."""
        kept: dict[OutputStream, bytearray] = {OutputStream.STDOUT: bytearray(), OutputStream.STDERR: bytearray()}
        truncated = False
        while (piece := await running.read()) is not None:
            stream, data = piece
            if order.stream:
                await self._send(_output(order.id, stream, data))
                continue
            room = order.limit_bytes - len(kept[stream])
            truncated |= len(data) > room
            kept[stream] += data[: max(0, room)]
        for stream, collected in kept.items():
            for start in range(0, len(collected), CHUNK_BYTES):
                await self._send(_output(order.id, stream, bytes(collected[start : start + CHUNK_BYTES])))
        return truncated


def _output(number: int, stream: OutputStream, data: bytes) -> Output:
    return Output(number, stream.value, base64.b64encode(data).decode("ascii"))
