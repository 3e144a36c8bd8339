"""The input and output of a shell or a program on the host, as its user gets them from ``WorkerLink``."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass, field
from typing import Protocol

from gpumesh.tunnels.base import ExecChunk, OutputStream
from gpumesh.tunnels.workers.protocol import Done, OutputPiece

INPUT_BYTES = 64 * 1024  # the most that one message takes to a program
CREDIT_BYTES = 128 * 1024  # the worker gets credit in pieces of this size or more, not one message for each line


@dataclass(slots=True)
class PendingCommand:
    """A command on the host, and its messages from the worker. ``None`` in ``messages``: the connection has ended.

    ``queued_bytes`` counts the bytes of output (as base64) in ``messages``; above ``limit_bytes`` the command is ended.
    ``inputs_taken`` counts the ``InputTaken`` of a program. ``input_changed`` is set when it grows, and at the end.
    """

    limit_bytes: int
    messages: asyncio.Queue[OutputPiece | Done | None] = field(default_factory=asyncio.Queue)
    queued_bytes: int = 0
    inputs_taken: int = 0
    has_ended: bool = False
    input_changed: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, message: Done | None) -> None:
        """Puts the last message into the queue. ``None``: the end of the connection has cut the command off."""
        self.messages.put_nowait(message)
        self.has_ended = True
        self.input_changed.set()


class CommandLink(Protocol):
    """The part of ``WorkerLink`` that a command's stream needs; see there."""

    async def send_input(self, command_id: int, data: bytes) -> None: ...

    async def send_credit(self, command_id: int, count: int) -> None: ...

    async def forget_command(self, command_id: int, *, succeeded: bool) -> None: ...

    def ensure_connected(self) -> None: ...

    def ensure_succeeded(self, done: Done | None) -> Done: ...


class LinkedShell:
    """The stream of a shell on the host; see ``base.ShellStream``."""

    def __init__(self, link: CommandLink, command_id: int, pending: PendingCommand) -> None:
        self._link = link
        self._command_id = command_id
        self._pending = pending

    async def write(self, data: bytes) -> None:
        await self._link.send_input(self._command_id, data)

    async def read(self) -> ExecChunk:
        message = await self._pending.messages.get()
        if isinstance(message, OutputPiece):
            self._pending.queued_bytes -= len(message.data)
            return ExecChunk(OutputStream(message.stream), base64.b64decode(message.data))
        self._pending.messages.put_nowait(message)  # for later calls, which must also get the end
        done = self._link.ensure_succeeded(message)
        return ExecChunk(OutputStream.STDOUT, b"", ended=True, exit_status=done.exit_status)

    async def close(self) -> None:
        await self._link.forget_command(self._command_id, succeeded=False)


class LinkedProgram:
    """The stream of a program on the host; see ``base.ProgramStream``."""

    def __init__(self, link: CommandLink, command_id: int, pending: PendingCommand) -> None:
        self._link = link
        self._command_id = command_id
        self._pending = pending
        self._shell = LinkedShell(link, command_id, pending)
        self._inputs_sent = 0
        self._uncredited = 0  # bytes that were read, and for which the worker has no credit yet

    def __repr__(self) -> str:
        return f"<LinkedProgram {self._command_id} {'ENDED' if self._pending.has_ended else 'RUNNING'}>"

    async def write(self, data: bytes) -> None:
        await self._wait_taken()  # a write that was cancelled may still be on its way
        for start in range(0, len(data), INPUT_BYTES):
            if self._pending.has_ended:
                return
            self._inputs_sent += 1
            await self._link.send_input(self._command_id, data[start : start + INPUT_BYTES])
            await self._wait_taken()

    async def _wait_taken(self) -> None:
        """Waits until the host has taken all input that was sent. Raises TunnelDown when the connection has ended."""
        pending = self._pending
        while pending.inputs_taken < self._inputs_sent and not pending.has_ended:
            pending.input_changed.clear()
            await pending.input_changed.wait()
        self._link.ensure_connected()

    async def read(self) -> ExecChunk:
        if self._uncredited >= CREDIT_BYTES:  # before the read: a call that is cancelled later loses no output
            count, self._uncredited = self._uncredited, 0
            await self._link.send_credit(self._command_id, count)
        chunk = await self._shell.read()
        self._uncredited += len(chunk.data)
        return chunk

    async def close(self) -> None:
        await self._shell.close()
        if not self._pending.has_ended:  # a task that reads or writes now must not wait for ever
            self._pending.end(Done(self._command_id, None, error="it was closed"))
