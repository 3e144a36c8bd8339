"""``ControlServer``: listens on the control socket and carries out the requests of other processes of the same user."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Self

from gpumesh.daemon.control_socket import messages
from gpumesh.daemon.control_socket.framing import LINE_LIMIT
from gpumesh.daemon.control_socket.messages import ControlReply, ControlRequest
from gpumesh.daemon.sessions.session import PromptRequest, Session
from gpumesh.errors import ExitCode, GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator

log = logging.getLogger(__name__)

BACKLOG = 1024  # a script may start hundreds of commands at once; a Unix socket refuses connections past its backlog
REQUEST_TIMEOUT_S = 10.0  # for the line of the request, which our clients send at once
DOWN_STATE_INTERVAL_S = 0.2  # between two states while the mesh drains


class ControlServer:
    """Offers ``session`` on a Unix socket with mode 0600. An async context manager: listens during its block.

    The process must hold the mesh's lock: then a socket that exists already is stale, and is replaced.

    ``on_stop`` is called for ``Down`` with the seconds that draining may take. Then the owner of the mesh must leave
    the block, which ends every open connection.
    """

    def __init__(
        self,
        session: Session,
        path: Path,
        *,
        on_stop: Callable[[float], None],
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._session = session
        self._path = path
        self._on_stop = on_stop
        self._request_timeout_s = request_timeout_s
        self._server: asyncio.Server | None = None  # ``None``: not listening
        self._inode = 0  # of our socket's file: shows whether the file at the path is still ours
        self._connections: set[asyncio.Task[None]] = set()  # a task for each open connection

    def __repr__(self) -> str:
        state = "LISTENING" if self._server is not None and self._server.is_serving() else "CLOSED"
        return f"<ControlServer {self._path} {state} {len(self._connections)} connections>"

    async def __aenter__(self) -> Self:
        self._server = await self._listen()
        return self

    async def _listen(self) -> asyncio.Server:
        """Makes the socket's file and listens on it. Raises OSError."""
        self._path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(
            self._handle_connection, path=self._path, limit=LINE_LIMIT, backlog=BACKLOG
        )
        self._path.chmod(0o600)  # its folder is 0700: no other user could connect before this line
        self._inode = self._path.stat().st_ino
        return server

    async def restore_socket(self) -> None:
        """Listens again if the socket's file was removed. Open connections go on.

        A system clears old files from /tmp, and removes a runtime folder at logout. Raises OSError.
        """
        if self._owns_socket():
            os.utime(self._path)  # makes the file new again, so that the system does not clear it
            return
        assert self._server is not None, "the server does not listen"
        old_server, self._server = self._server, await self._listen()
        old_server.close()  # ends only the listening

    async def __aexit__(self, *_: object) -> None:
        """Stops listening, cancels the requests in progress, and removes the socket's file if it is still ours."""
        assert self._server is not None, "the server does not listen"
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        if self._owns_socket():
            self._path.unlink(missing_ok=True)

    def _owns_socket(self) -> bool:
        """Whether the file at our path is the socket that we listen on."""
        try:
            return self._path.lstat().st_ino == self._inode
        except FileNotFoundError:  # a system has cleared the folder, or another mesh removed the file
            return False

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads one request, answers it, and closes the connection."""
        task = asyncio.current_task()
        assert task is not None, "asyncio has called this outside of a task"
        self._connections.add(task)
        try:
            line = await self._read_request(reader, writer)
            if line:
                await self._answer_until_client_closes(line, reader, writer)
        except ConnectionError:
            pass  # the client is gone
        except asyncio.CancelledError:
            pass  # the mesh closes. Not raised again, because asyncio would log a cancelled callback as an error.
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _read_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Returns the request's line; empty when the client closes the connection, sends no line in time, or sends a
        line that is too long. Only the last gets a reply."""
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await reader.readline()
        except TimeoutError:
            return b""  # a client that connects and sends nothing must not stay for ever
        except ValueError:  # ``readline`` raises it for a line of more than LINE_LIMIT bytes
            message = f"a request is longer than {LINE_LIMIT >> 20} MiB"
            await _send_reply(writer, messages.Error("usage", message, exit_code=int(ExitCode.USAGE)))
            return b""

    async def _answer_until_client_closes(
        self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answers the request. Cancels the answer as soon as the client closes its connection."""
        answering = asyncio.ensure_future(self._answer(line, writer))
        # A client sends nothing after its request, so ``read`` returns only when the client closes its connection.
        client_closing = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, client_closing}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()  # raises the error of the answer
        finally:
            for task in (answering, client_closing):
                task.cancel()
            await asyncio.gather(answering, client_closing, return_exceptions=True)

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Sends all replies to one request. The last reply is ``End`` or ``Error``. Raises ConnectionError when the
        client is gone."""
        try:
            request = messages.decode_request(line)
        except (ValueError, RecursionError) as error:
            await _send_reply(writer, messages.Error("usage", str(error), exit_code=int(ExitCode.USAGE)))
            return
        last_reply: ControlReply = messages.End()
        try:
            async with aclosing(self._replies(request)) as replies:
                async for reply in replies:
                    await _send_reply(writer, reply)
        except GPUMeshError as error:
            last_reply = messages.message_from_error(error)
        except ConnectionError:
            raise  # the client is gone
        except Exception as error:  # a bug must not end the mesh: the client gets the error, and the log its trace
            log.exception("a request over the control socket failed: %s", type(request).__name__)
            last_reply = messages.Error(
                "failed", f"the running mesh failed inside: {error!r}", "`gpumesh logs` has the details"
            )
        await _send_reply(writer, last_reply)

    async def _replies(self, request: ControlRequest) -> AsyncGenerator[ControlReply]:
        """Carries out the request, and yields the replies before ``End``. Raises GPUMeshError."""
        session = self._session
        match request:
            case messages.GetStatus():
                yield messages.State(await session.status())
            case messages.FirstReport(timeout_s):
                yield messages.State(await session.wait_first_report(timeout_s))
            case messages.Watch(interval_s):
                async with aclosing(_state_replies(session, interval_s)) as replies:
                    async for reply in replies:
                        yield reply
            case messages.Chat(prompt):
                async with aclosing(_chat_replies(session, prompt)) as replies:
                    async for reply in replies:
                        yield reply
            case messages.Exec(node, argv):
                async with aclosing(_exec_replies(session, node, argv)) as replies:
                    async for reply in replies:
                        yield reply
            case messages.Drain(node):
                await session.drain(node)
            case messages.Resume(node):
                await session.resume(node)
            case messages.Hold(node, outage):
                async with session.hold(node, outage):
                    yield messages.Held()
                    await asyncio.Event().wait()  # until the client closes its connection, which cancels this
            case messages.Reconnect(node):
                await session.reconnect(node)
            case messages.GetHistory():
                yield messages.Past(await session.history())
            case messages.GetConfiguration():
                snapshot = await session.configuration()
                if snapshot is not None:
                    yield messages.Configuration(snapshot)
            case messages.Reload():
                yield messages.Reloaded(await session.reload())
            case messages.PlanPool(spec):
                yield messages.PlannedPool(await session.plan_pool(spec))
            case messages.StartPool(name):
                async with closing_iterator(session.start_pool(name)) as pool_states:
                    async for pool_state in pool_states:
                        yield messages.PoolStates((pool_state,))
            case messages.StopPool(name):
                await session.stop_pool(name)
            case messages.GetPools():
                yield messages.PoolStates(await session.pools())
            case messages.Down(drain_s):
                self._on_stop(drain_s)
                async with aclosing(_state_replies(session, DOWN_STATE_INTERVAL_S)) as replies:
                    async for reply in replies:
                        yield reply


async def _state_replies(session: Session, interval_s: float) -> AsyncGenerator[ControlReply]:
    """Yields the state of the mesh now, and after each change, at most once in ``interval_s`` seconds."""
    async with closing_iterator(session.watch(interval_s)) as states:
        async for state in states:
            yield messages.State(state)


async def _chat_replies(session: Session, prompt: PromptRequest) -> AsyncGenerator[ControlReply]:
    """Yields the chunks of an answer, and the node's route before the first chunk and whenever it has changed."""
    async with session.chat(prompt) as stream:
        sent_route: messages.Route | None = None
        async for chunk in stream:
            route = messages.Route(stream.node, stream.attempts)
            if route != sent_route:
                yield route
                sent_route = route
            yield messages.Piece(chunk)


async def _exec_replies(session: Session, node: str, argv: tuple[str, ...]) -> AsyncGenerator[ControlReply]:
    """Yields the output of a command on the node's host."""
    async with closing_iterator(session.exec(node, argv)) as chunks:
        async for chunk in chunks:
            data = base64.b64encode(chunk.data).decode("ascii")
            yield messages.Output(chunk.stream.value, data, chunk.ended, chunk.exit_status)


async def _send_reply(writer: asyncio.StreamWriter, reply: ControlReply) -> None:
    writer.write(messages.encode_message(reply))
    await writer.drain()
