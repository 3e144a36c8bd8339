"""``RemoteSession``: the operations of a mesh that runs in another process, over its control socket; also `down`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from pathlib import Path

from gpumesh.backends.base import Chunk
from gpumesh.config.comparison import RESTART_HINT, ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon.control_socket import client_errors, framing, messages
from gpumesh.daemon.control_socket.framing import UNKNOWN_MESSAGE
from gpumesh.daemon.control_socket.messages import ControlReply, ControlRequest
from gpumesh.daemon.sessions.session import PromptAnswer, PromptRequest
from gpumesh.errors import ExitCode, GPUMeshError, UsageError
from gpumesh.mesh.history import History
from gpumesh.mesh.outages.outage import Outage
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan, PoolState
from gpumesh.state import MeshState
from gpumesh.tunnels.base import ExecChunk, OutputStream


class RemoteSession:
    """The Session of the mesh that listens on ``socket``. Each call opens its own connection.

    When the caller stops reading, the connection is closed, which cancels the request.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def __repr__(self) -> str:
        return f"<RemoteSession {self._socket}>"

    async def status(self) -> MeshState:
        return await self._request_state(messages.GetStatus())

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        return await self._request_state(messages.FirstReport(timeout_s))

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        async with aclosing(self._send_request(messages.Watch(interval_s))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    yield reply.state

    def chat(self, prompt: PromptRequest) -> AbstractAsyncContextManager[PromptAnswer]:
        return self._open_chat(prompt)

    @asynccontextmanager
    async def _open_chat(self, prompt: PromptRequest) -> AsyncIterator[PromptAnswer]:
        async with aclosing(self._send_request(messages.Chat(prompt))) as replies:
            yield _RemoteChat(replies)

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        async with aclosing(self._send_request(messages.Exec(node, tuple(argv)))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.Output):
                    yield _exec_chunk(reply)

    async def drain(self, node: str) -> None:
        await self._request_completion(messages.Drain(node))

    async def resume(self, node: str) -> None:
        await self._request_completion(messages.Resume(node))

    @asynccontextmanager
    async def hold(self, node: str, outage: Outage) -> AsyncIterator[None]:
        reader, writer = await self._connect()
        try:
            writer.write(messages.encode_message(messages.Hold(node, outage)))
            await writer.drain()
            line = await reader.readline()
            if not line:
                raise client_errors.MeshEnded
            reply = _decode_reply(line)
            if isinstance(reply, messages.Error):
                error = messages.error_from_message(reply)
                raise _explain_unknown(error, "which cannot take a node out of service for a while")
            if not isinstance(reply, messages.Held):
                raise client_errors.unreadable_reply()
            yield
            writer.write_eof()  # the mesh puts the node back now, and closes the connection when this is done
            if line := await reader.readline():
                failure = _decode_reply(line)
                if isinstance(failure, messages.Error):
                    raise messages.error_from_message(failure)
        except ConnectionError as error:  # a mesh that has ended holds no node
            raise client_errors.MeshEnded from error
        finally:  # this alone makes the mesh put the node back
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def reconnect(self, node: str) -> None:
        await self._request_completion(messages.Reconnect(node))

    async def configuration(self) -> ConfigSnapshot | None:
        try:
            async with aclosing(self._send_request(messages.GetConfiguration())) as replies:
                async for reply in replies:
                    if isinstance(reply, messages.Configuration):
                        return reply.snapshot
        except messages.RemoteError as error:
            if error.exit_code is not ExitCode.USAGE:
                raise
            # A mesh of an older version does not know this request.
        return None

    async def reload(self) -> ReloadReport:
        try:
            async with aclosing(self._send_request(messages.Reload())) as replies:
                async for reply in replies:
                    if isinstance(reply, messages.Reloaded):
                        return reply.report
        except messages.RemoteError as error:
            raise _explain_unknown(error, "which reads mesh.yaml at its start only") from None
        raise client_errors.unreadable_reply()

    async def history(self) -> History:
        history = History()
        async with aclosing(self._send_request(messages.GetHistory())) as replies:
            async for reply in replies:
                if isinstance(reply, messages.Past):
                    history = reply.history
        return history

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        async with aclosing(self._send_pool_request(messages.PlanPool(spec))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.PlannedPool):
                    return reply.plan
        raise client_errors.unreadable_reply()

    async def start_pool(self, name: str) -> AsyncGenerator[PoolState]:
        async with aclosing(self._send_pool_request(messages.StartPool(name))) as replies:
            async for reply in replies:
                if isinstance(reply, messages.PoolStates):
                    for state in reply.pools:
                        yield state

    async def stop_pool(self, name: str) -> None:
        async with aclosing(self._send_pool_request(messages.StopPool(name))) as replies:
            async for _ in replies:
                pass

    async def pools(self) -> tuple[PoolState, ...]:
        states: tuple[PoolState, ...] = ()
        async with aclosing(self._send_pool_request(messages.GetPools())) as replies:
            async for reply in replies:
                if isinstance(reply, messages.PoolStates):
                    states = reply.pools
        return states

    async def _send_pool_request(self, request: ControlRequest) -> AsyncGenerator[ControlReply]:
        """As ``_send_request``. A mesh of an older version gives the error that it has no pools."""
        try:
            async with aclosing(self._send_request(request)) as replies:
                async for reply in replies:
                    yield reply
        except messages.RemoteError as error:
            raise _explain_unknown(error, "which has no pools") from None

    async def down(self, drain_s: float) -> AsyncGenerator[MeshState]:
        """Asks the mesh to stop. Yields its states while it drains, until it closes the connection."""
        async with aclosing(self._send_request(messages.Down(drain_s), until_closed=True)) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    yield reply.state

    async def _request_state(self, request: ControlRequest) -> MeshState:
        """Returns the state that the mesh sends as its reply. Raises GPUMeshError when the mesh sends none."""
        state: MeshState | None = None
        async with aclosing(self._send_request(request)) as replies:
            async for reply in replies:
                if isinstance(reply, messages.State):
                    state = reply.state
        if state is None:
            raise GPUMeshError("the running mesh ended without telling its state")
        return state

    async def _request_completion(self, request: ControlRequest) -> None:
        """Returns when the mesh has done what the request asks for."""
        async with aclosing(self._send_request(request)) as replies:
            async for _ in replies:
                pass

    async def _send_request(
        self, request: ControlRequest, *, until_closed: bool = False
    ) -> AsyncGenerator[ControlReply]:
        """Sends the request and yields the replies before ``End``.

        Raises MeshNotRunning when no mesh listens, the mesh's own error for ``Error``, and MeshEnded when the mesh
        closes the connection without ``End``. With ``until_closed``, closing the connection is no error.
        """
        reader, writer = await self._connect()
        connection_error: OSError | None = None
        try:
            writer.write(messages.encode_message(request))
            await writer.drain()
            while line := await reader.readline():
                reply = _decode_reply(line)
                if isinstance(reply, messages.End):
                    return
                if isinstance(reply, messages.Error):
                    raise messages.error_from_message(reply)
                yield reply
        except OSError as error:  # raised below, unless the mesh was expected to close the connection
            connection_error = error
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if not until_closed:
            raise client_errors.MeshEnded from connection_error

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to the control socket. Raises MeshNotRunning when no mesh listens, else GPUMeshError."""
        try:
            return await asyncio.open_unix_connection(self._socket, limit=framing.LINE_LIMIT)
        except OSError as error:
            raise client_errors.connect_error(error, self._socket) from error


class _RemoteChat:
    """The PromptAnswer whose chunks come as replies to ``Chat``."""

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


def _explain_unknown(error: GPUMeshError, limitation: str) -> GPUMeshError:
    """The error itself; if a mesh of an older version does not know the request, one that says so. ``limitation``: what
    that version cannot do, after "an older version, "."""
    if error.code == UsageError.code and UNKNOWN_MESSAGE in error.message:
        return GPUMeshError(f"the running mesh is of an older version, {limitation}", hint=RESTART_HINT)
    return error


def _decode_reply(line: bytes) -> ControlReply:
    """Returns the reply in a line. Raises GPUMeshError when the reply cannot be read."""
    try:
        return messages.decode_reply(line)
    except (ValueError, RecursionError) as error:
        raise client_errors.unreadable_reply(error) from error


def _exec_chunk(output: messages.Output) -> ExecChunk:
    """Returns the chunk of output in a reply. Raises GPUMeshError when its data is not base64 or its stream is
    unknown."""
    try:
        data = base64.b64decode(output.data, validate=True)
        stream = OutputStream(output.stream)
    except ValueError as error:
        raise client_errors.unreadable_reply() from error
    return ExecChunk(stream, data, output.ended, output.exit_status)
