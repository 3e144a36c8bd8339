"""A Session behind a control socket: the running mesh, as another process sees it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from pathlib import Path

from gpumesh.backends.base import Chunk
from gpumesh.daemon import messages
from gpumesh.daemon.messages import LINE_LIMIT, ControlReply, ControlRequest
from gpumesh.daemon.session import ChatStream, PromptRequest
from gpumesh.errors import GPUMeshError, MeshNotRunning
from gpumesh.mesh.history import History
from gpumesh.state import MeshState
from gpumesh.tunnels.base import ExecChunk, OutputStream


class RemoteSession:
    """Each call is a connection of its own: closing it is how a request is cancelled."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def status(self) -> MeshState:
        return await self._state(messages.GetStatus())

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        return await self._state(messages.FirstReport(timeout_s))

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        async with aclosing(self._ask(messages.Watch(interval_s))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    yield reply.state

    def chat(self, ask: PromptRequest) -> AbstractAsyncContextManager[ChatStream]:
        return self._chat(ask)

    @asynccontextmanager
    async def _chat(self, ask: PromptRequest) -> AsyncIterator[ChatStream]:
        async with aclosing(self._ask(messages.Chat(ask))) as replies:
            yield _RemoteChat(replies)

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        async with aclosing(self._ask(messages.Exec(node, tuple(argv)))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.Output):
                    yield _exec_chunk(reply)

    async def drain(self, node: str) -> None:
        await self._done(messages.Drain(node))

    async def resume(self, node: str) -> None:
        await self._done(messages.Resume(node))

    async def reconnect(self, node: str) -> None:
        await self._done(messages.Reconnect(node))

    async def history(self) -> History:
        history = History()
        async with aclosing(self._ask(messages.GetHistory())) as replies:
            async for reply in replies:
                if isinstance(reply, messages.Past):
                    history = reply.history
        return history

    async def down(self, drain_s: float) -> AsyncGenerator[MeshState]:
        """Asks the mesh to stop; the states while it drains, until its socket closes."""
        async with aclosing(self._ask(messages.Down(drain_s), until_closed=True)) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    yield reply.state

    async def _state(self, request: ControlRequest) -> MeshState:
        state: MeshState | None = None
        async with aclosing(self._ask(request)) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    state = reply.state
        if state is None:
            raise GPUMeshError("the running mesh ended without telling its state")
        return state

    async def _done(self, request: ControlRequest) -> None:
        async with aclosing(self._ask(request)) as replies:
            async for _ in replies:
                pass

    async def _ask(self, request: ControlRequest, *, until_closed: bool = False) -> AsyncGenerator[ControlReply]:
        """Raises MeshNotRunning when nobody listens, the told error for ``Error``, and a GPUMeshError when the mesh
        ends in the middle of an answer (which is what is waited for with ``until_closed``)."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket, limit=LINE_LIMIT)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise MeshNotRunning("no mesh is running for this configuration") from error
        except OSError as error:
            if error.errno is None:  # Python's own: the path is longer than a socket's may be, so none can listen there
                raise MeshNotRunning("no mesh is running for this configuration") from error
            raise GPUMeshError(f"cannot reach the running mesh at {self._socket}: {error.strerror}") from error
        try:
            writer.write(messages.encode_message(request))
            await writer.drain()
            while line := await reader.readline():
                try:
                    reply = messages.decode_reply(line)
                except (ValueError, RecursionError) as error:
                    raise GPUMeshError(f"the running mesh said what this gpumesh cannot read: {error}") from error
                if isinstance(reply, messages.End):
                    return
                if isinstance(reply, messages.Error):
                    raise messages.error_from_message(reply)
                yield reply
            closed: OSError | None = None
        except OSError as error:
            closed = error
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if not until_closed:
            raise GPUMeshError(
                "the running mesh ended in the middle of this", hint="`gpumesh logs` says why"
            ) from closed


class _RemoteChat:
    def __init__(self, replies: AsyncIterator[ControlReply]) -> None:
        self._replies = replies
        self.node: str | None = None
        self.attempts = 0

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for reply in self._replies:
            if isinstance(reply, messages.Route):
                self.node, self.attempts = reply.node, reply.attempts
            elif isinstance(reply, messages.Piece):
                yield reply.chunk


def _exec_chunk(output: messages.Output) -> ExecChunk:
    try:
        data = base64.b64decode(output.data, validate=True)
    except binascii.Error as error:
        raise GPUMeshError("the running mesh said what this gpumesh cannot read") from error
    return ExecChunk(OutputStream(output.stream), data, output.ended, output.exit_status)
