"""The supervisor's side of one connection: what it asks its worker, and what the worker tells by itself."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from gpumesh.errors import ExecError, TunnelDown, TunnelError, tunnel_error_from_code
from gpumesh.tunnels.base import ExecChunk, ExecResult, OutputStream, Prompter
from gpumesh.tunnels.lifecycle import Cause
from gpumesh.tunnels.transport import ConnectionInfo
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
from gpumesh.tunnels.workers.worker_pool import WorkerHandle

STREAM_BOUND = 64 << 20  # bytes of a streamed command's output that wait for their reader
DEADLINE_SLACK_S = 2.0  # beyond a deadline that the worker keeps itself


def cause_from_error(error: TunnelError) -> Cause:
    return Cause(error.code, error.message, error.hint, needs_person=error.needs_person)


def error_from_cause(cause: Cause, node: str) -> TunnelError:
    return tunnel_error_from_code(cause.code, cause.message, hint=cause.hint, node=node)


@dataclass(slots=True)
class _Running:
    """A command on the host. ``waiting`` counts the bytes in ``pieces``."""

    limit_bytes: int
    pieces: asyncio.Queue[Output | Done | None] = field(default_factory=asyncio.Queue)
    waiting: int = 0


class WorkerLink:
    """Runs beside one worker; ``end_cause`` holds why it is over, once it is. ``connected`` is set when it is
    connected."""

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
        loop = asyncio.get_running_loop()
        self.end_cause: asyncio.Future[Cause] = loop.create_future()
        self.connected = asyncio.Event()
        self.open_prompts = 0
        self._node = node
        self._worker = worker
        self._ask = prompter
        self._on_up = on_connected
        self._on_forward_failed = on_forward_failed
        self._on_peer_refused = on_peer_refused
        self._ids = itertools.count(1)
        self._pings: dict[int, asyncio.Future[float | None]] = {}
        self._commands: dict[int, _Running] = {}

    def finish(self, cause: Cause) -> None:
        """It is over, for this reason; the first one stands. What still waits for an answer gets its error."""
        if not self.end_cause.done():
            self.end_cause.set_result(cause)
        for ping in self._pings.values():
            if not ping.done():
                ping.set_result(None)
        for command in self._commands.values():
            command.pieces.put_nowait(None)

    async def receive_messages(self, group: asyncio.TaskGroup) -> None:
        """Until the worker says no more. Questions to a person wait in ``group``, so that nothing else has to."""
        while True:
            try:
                message = await self._worker.receive()
            except ValueError as error:
                self.finish(Cause("tunnel-lost", f"the tunnel's process of {self._node} said something odd: {error}"))
                return
            if message is None:
                self.finish(Cause("tunnel-lost", f"the tunnel's process of {self._node} ended unexpectedly"))
                return
            self._take(message, group)

    def _take(self, message: FromWorker, group: asyncio.TaskGroup) -> None:
        match message:
            case ConnectionInfo():
                self.connected.set()
                self._on_up(message)
            case Failed() | Lost():
                error = tunnel_error_from_code(message.code, message.message, hint=message.hint, node=self._node)
                self.finish(cause_from_error(error))
            case Pong(id=number, rtt_ms=rtt_ms):
                ping = self._pings.get(number)
                if ping is not None and not ping.done():
                    ping.set_result(rtt_ms)
            case Output() | Done():
                self._deliver(message)
            case ForwardFailed():
                self._on_forward_failed(message)
            case PeerRefused():
                self._on_peer_refused(message)
            case Prompt():
                group.create_task(self._answer(message))

    async def _answer(self, prompt: Prompt) -> None:
        self.open_prompts += 1
        try:
            text = None if self._ask is None else await self._ask(self._node, prompt.text, echo=prompt.echo)
            await self._worker.send(Reply(prompt.id, text))
        except TunnelDown:
            pass  # its worker has gone; ``receive_messages`` says why
        finally:
            self.open_prompts -= 1

    async def ping(self, timeout_s: float) -> float | None:
        """The round trip in ms; ``None``: no sign of life within ``timeout_s``, of the host or of our own worker."""
        number = next(self._ids)
        answer: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._pings[number] = answer
        try:
            async with asyncio.timeout(timeout_s + 0.25):
                await self._worker.send(Ping(number, timeout_s))
                return await answer
        except (TimeoutError, TunnelDown):
            return None
        finally:
            del self._pings[number]

    async def close(self, timeout_s: float) -> None:
        """In order: the worker is asked to close, and is waited for."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._worker.send(Close())
                while await self._worker.receive() is not None:
                    pass
        except (TimeoutError, TunnelDown, ValueError):
            pass  # the caller kills what did not close

    # -- commands ----------------------------------------------------------------------------------------------------

    def _deliver(self, message: Output | Done) -> None:
        command = self._commands.get(message.id)
        if command is None:
            return  # nobody waits for it any more
        if isinstance(message, Output):
            command.waiting += len(message.data)
            if command.waiting > command.limit_bytes:
                command.pieces.put_nowait(Done(message.id, None, error="its output came faster than it was read"))
                del self._commands[message.id]
                return
        command.pieces.put_nowait(message)

    async def _begin(self, order: Exec, bound: int) -> _Running:
        running = self._commands[order.id] = _Running(bound)
        if self.end_cause.done():
            raise TunnelDown(f"the tunnel of {self._node} is down", node=self._node)
        await self._worker.send(order)
        return running

    async def _finish(self, number: int, *, done: bool) -> None:
        self._commands.pop(number, None)
        if not done and not self.end_cause.done():
            try:
                async with asyncio.timeout(DEADLINE_SLACK_S):
                    await self._worker.send(Kill(number))
            except (TimeoutError, TunnelDown):
                pass  # with the connection, its commands end too

    def _failed(self, done: Done | None) -> ExecError | None:
        if done is None:
            why = self.end_cause.result().message if self.end_cause.done() else "the tunnel closed"
            return ExecError(f"the command was cut off on {self._node}: {why}", node=self._node)
        if done.error is not None:
            return ExecError(f"the command failed on {self._node}: {done.error}", node=self._node)
        return None

    async def run_command(self, command: str, *, timeout_s: float, limit_bytes: int) -> ExecResult:
        """Raises ExecError and TunnelDown."""
        order = Exec(next(self._ids), command, timeout_s, limit_bytes)
        output = {OutputStream.STDOUT: bytearray(), OutputStream.STDERR: bytearray()}
        done = False
        try:
            async with asyncio.timeout(timeout_s + DEADLINE_SLACK_S):
                # Base64 takes 4 bytes for 3, and there are two streams, each with a short last piece.
                running = await self._begin(order, bound=4 * limit_bytes + (1 << 20))
                while isinstance(message := await running.pieces.get(), Output):
                    output[OutputStream(message.stream)] += base64.b64decode(message.data)
            done = message is not None and message.error is None
        except TimeoutError as error:
            raise ExecError(f"no end of the command within {timeout_s:g} s on {self._node}", node=self._node) from error
        finally:
            await self._finish(order.id, done=done)
        if failure := self._failed(message):
            raise failure
        assert message is not None
        stdout, stderr = bytes(output[OutputStream.STDOUT]), bytes(output[OutputStream.STDERR])
        return ExecResult(message.exit_status, stdout, stderr, truncated=message.truncated)

    async def stream_command(self, command: str) -> AsyncGenerator[ExecChunk, None]:
        """As ``run_command``, piece by piece. Closing the iterator ends the command."""
        order = Exec(next(self._ids), command, None, 0, stream=True)
        done = False
        try:
            running = await self._begin(order, bound=STREAM_BOUND)
            while isinstance(message := await running.pieces.get(), Output):
                running.waiting -= len(message.data)
                yield ExecChunk(OutputStream(message.stream), base64.b64decode(message.data))
            done = message is not None and message.error is None
            if failure := self._failed(message):
                raise failure
            assert message is not None
            yield ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=message.exit_status)
        finally:
            await self._finish(order.id, done=done)
