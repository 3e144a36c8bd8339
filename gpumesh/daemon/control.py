"""The control socket's server: any Session, offered to the processes of the same user."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Self

from gpumesh.daemon import messages
from gpumesh.daemon.async_generators import closing_iterator
from gpumesh.daemon.messages import LINE_LIMIT, ControlReply, ControlRequest
from gpumesh.daemon.session import Session
from gpumesh.errors import GPUMeshError

log = logging.getLogger(__name__)

BACKLOG = 1024  # a script may start hundreds of commands at once; past it a Unix socket refuses
REQUEST_S = 10.0  # for the one line that whoever connects sends at once


class ControlServer:
    """Listens on a Unix socket, mode 0600. Use as an async context manager, by the holder of the mesh's lock: a socket
    that lies there already is stale.

    ``stop`` is called for ``Down`` with the seconds that draining may take; who serves the mesh then leaves the
    context, which ends every open connection.
    """

    def __init__(
        self, session: Session, path: Path, *, on_stop: Callable[[float], None], request_timeout_s: float = REQUEST_S
    ) -> None:
        self._session = session
        self._path = path
        self._stop = on_stop
        self._request_s = request_timeout_s
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await self._listen()
        return self

    async def _listen(self) -> asyncio.Server:
        self._path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._connected, path=self._path, limit=LINE_LIMIT, backlog=BACKLOG)
        self._path.chmod(0o600)  # its folder is 0700: there is no moment in which another user could have come in
        self._inode = self._path.stat().st_ino
        return server

    async def restore_socket(self) -> None:
        """Listens anew if its socket was taken away (``MeshLock.keep`` says by whom); what is connected goes on.

        Raises OSError.
        """
        if self._is_ours():
            os.utime(self._path)
            return
        assert self._server is not None
        lost, self._server = self._server, await self._listen()
        lost.close()

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        try:
            return self._path.lstat().st_ino == self._inode
        except FileNotFoundError:
            return False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except ConnectionError:
            pass  # who asked is gone; there is nobody to tell
        except asyncio.CancelledError:
            pass  # the mesh closes; the task ends here, and asyncio would log a cancelled callback as an error
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._request_s):
                line = await reader.readline()
        except TimeoutError:
            return  # who connects and says nothing must not hold a place for ever
        except ValueError:
            await _send(
                writer, messages.Error("usage", f"a request is longer than {LINE_LIMIT >> 20} MiB", exit_code=2)
            )
            return
        if not line:
            return
        answer = asyncio.ensure_future(self._answer(line, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = messages.decode_request(line)
        except (ValueError, RecursionError) as error:
            await _send(writer, messages.Error("usage", str(error), exit_code=2))
            return
        last: ControlReply = messages.End()
        try:
            async with aclosing(self._replies(request)) as replies:
                async for reply in replies:
                    await _send(writer, reply)
        except GPUMeshError as error:
            last = messages.message_from_error(error)
        except ConnectionError:
            raise
        except Exception as error:  # a bug in one request must not end the mesh: say so there, and keep the trace
            log.exception("a request over the control socket failed: %s", type(request).__name__)
            last = messages.Error(
                "failed", f"the running mesh failed inside: {error!r}", "`gpumesh logs` has the details"
            )
        await _send(writer, last)

    async def _replies(self, request: ControlRequest) -> AsyncGenerator[ControlReply]:
        session = self._session
        match request:
            case messages.GetStatus():
                yield messages.State(await session.status())
            case messages.FirstReport(timeout_s):
                yield messages.State(await session.wait_first_report(timeout_s))
            case messages.Watch(interval_s):
                async with closing_iterator(session.watch(interval_s)) as states:
                    async for state in states:
                        yield messages.State(state)
            case messages.Chat(ask):
                async with session.chat(ask) as stream:
                    route: messages.Route | None = None
                    async for chunk in stream:
                        if (now := messages.Route(stream.node, stream.attempts)) != route:
                            yield (route := now)
                        yield messages.Piece(chunk)
            case messages.Exec(node, argv):
                async with closing_iterator(session.exec(node, argv)) as chunks:
                    async for piece in chunks:
                        data = base64.b64encode(piece.data).decode("ascii")
                        yield messages.Output(piece.stream.value, data, piece.ended, piece.exit_status)
            case messages.Drain(node):
                await session.drain(node)
            case messages.Resume(node):
                await session.resume(node)
            case messages.Reconnect(node):
                await session.reconnect(node)
            case messages.GetHistory():
                yield messages.Past(await session.history())
            case messages.Down(drain_s):
                self._stop(drain_s)
                async with closing_iterator(session.watch(0.2)) as states:
                    async for state in states:
                        yield messages.State(state)


async def _send(writer: asyncio.StreamWriter, reply: ControlReply) -> None:
    writer.write(messages.encode_message(reply))
    await writer.drain()
