"""Starts worker processes, one for each connection: a zygote (zygote.py) forks each worker in milliseconds.

Each connection has a process of its own. In the mesh's process a connection would share the interpreter lock with the
gateway, and many streams would come late or be lost (docs/internals/tunnels.md).

No process outlives the mesh. Zygote and workers end when their socket ends. If they are too busy to read it, on Linux
PR_SET_PDEATHSIG ends them: a worker's parent is the zygote, whose parent is the mesh. Secrets travel over the socket
only. When a zygote dies, its workers die too, and the next ``spawn`` starts another zygote.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from gpumesh.config import environment
from gpumesh.errors import TunnelDown, TunnelError
from gpumesh.text.lines import LineBuffer
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.workers import zygote
from gpumesh.tunnels.workers.protocol import FromWorker, ToWorker, decode_message, encode_message

LINE_LIMIT = 4 << 20  # bytes of one JSON line; a worker sends a command's output in far smaller pieces
SPAWN_TIMEOUT_S = 20.0  # for one fork; the first fork waits for the zygote's imports, perhaps on a machine under load
STOP_TIMEOUT_S = 3.0  # the time for the zygote to end all workers; more than twice zygote.END_PATIENCE_S
SEND_RETRY_S = 0.005  # time between two attempts while the control socket is full of requests
TITLE_ROOM = 64  # characters of the command line that a process title can overwrite


class WorkerHandle:
    """The mesh's handle of one worker process: sends and receives its messages, and ends it.

    A handle must be closed (``close`` or ``async with``), also when the process has ended.
    """

    def __init__(
        self, node: str, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pool: WorkerPool
    ) -> None:
        self.node = node
        self.pid = pid
        self._reader = reader
        self._writer = writer
        self._pool = pool

    def __repr__(self) -> str:
        return f"<WorkerHandle {self.node} pid {self.pid} {'ENDED' if self._ended else 'RUNNING'}>"

    @property
    def _ended(self) -> bool:
        return self._writer.is_closing() or self._reader.at_eof()

    async def send(self, message: ToWorker) -> None:
        """Sends the message. Raises ``TunnelDown`` when the worker has ended."""
        if self._ended:
            raise TunnelDown(f"the tunnel's process of {self.node} has ended", node=self.node)
        try:
            self._writer.write(encode_message(message))
            await self._writer.drain()
        except (ConnectionError, OSError) as error:
            raise TunnelDown(f"the tunnel's process of {self.node} has ended", node=self.node) from error

    async def receive(self) -> FromWorker | None:
        """Waits for the worker's next message; ``None`` when no more will come. Only one task may wait at a time.

        Raises ValueError for a line that is no message.
        """
        try:
            line = await self._reader.readline()
        except (ConnectionError, OSError, ValueError):  # ValueError: a line longer than LINE_LIMIT
            return None
        if not line.endswith(b"\n"):
            return None  # the process ended in the middle of a line
        return decode_message(line)  # type: ignore[return-value]  # a worker sends only FromWorker

    def kill(self) -> None:
        """Ends the process and all connections that it forwards at once (SIGKILL). Does nothing when the process has
        ended already."""
        self._pool.kill(self.pid)

    async def close(self) -> None:
        """Closes the socket, which also ends a worker that still runs."""
        self._writer.close()
        with contextlib.suppress(ConnectionError, OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> WorkerHandle:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class WorkerPool:
    """``async with WorkerPool() as pool: worker = await pool.spawn(setup, listeners)``.

    The zygote starts at the first ``spawn`` or ``prestart``. After the block, the zygote and every worker have ended.
    ``stderr`` gets the tracebacks of their crashes, and is a value as ``subprocess.Popen`` takes it.
    """

    def __init__(self, *, stderr: int | None = subprocess.DEVNULL) -> None:
        self._stderr = stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None  # the connection to the zygote; ``None``: no zygote runs
        self._request_count = 0  # also the id of the last request
        self._pending_forks: dict[int, asyncio.Future[dict[str, Any]]] = {}  # the zygote's answers, by request id
        self._answer_lines = LineBuffer()

    def __repr__(self) -> str:
        state = "NOT STARTED" if self._process is None else f"zygote {self._process.pid}"
        return f"<WorkerPool {state} {len(self._pending_forks)} forks pending>"

    async def __aenter__(self) -> WorkerPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop_zygote()

    @property
    def zygote_pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def prestart(self) -> None:
        """Starts the zygote now, so that the first ``spawn`` is as quick as a later ``spawn``."""
        if self._control is None:
            self._start_zygote()

    async def spawn(self, setup: ConnectRequest, listeners: Sequence[socket.socket]) -> WorkerHandle:
        """Starts a worker with ``setup`` and with copies of ``listeners``, and returns its handle.

        Raises ``TunnelError`` when no process can be started.
        """
        our_end, worker_end = socket.socketpair()
        try:
            with worker_end:
                pid = await self._fork(setup.node, [worker_end, *listeners])
            reader, writer = await asyncio.open_unix_connection(sock=our_end, limit=LINE_LIMIT)
        except BaseException:  # also when cancelled: a worker that was forked ends when its socket ends
            our_end.close()
            raise
        handle = WorkerHandle(setup.node, pid, reader, writer, self)
        try:
            await handle.send(setup)
        except BaseException:
            await handle.close()
            raise
        return handle

    def kill(self, pid: int) -> None:
        """Kills a worker (SIGKILL) through the zygote: only the zygote knows whether the pid is still that worker's."""
        if self._control is None:
            return
        with contextlib.suppress(OSError):
            self._control.send(zygote.encode_line({"kill": pid}))

    # -- requests to the zygote --------------------------------------------------------------------------------------

    async def _fork(self, node: str, sockets: Sequence[socket.socket]) -> int:
        """Forks a worker that gets ``sockets``, and returns its pid. Calls may run at the same time.

        Starts the zygote if needed, and once replaces a zygote that has died or does not answer.
        """
        for attempt in (1, 2):
            if self._control is None:
                self._start_zygote()
            control = self._control
            try:
                async with asyncio.timeout(SPAWN_TIMEOUT_S):
                    return await self._request_fork(node, [sock.fileno() for sock in sockets])
            except (OSError, EOFError) as error:  # TimeoutError is an OSError
                if self._control is control:  # otherwise another call has replaced the zygote already
                    await self._stop_zygote()
                if attempt == 2:
                    raise TunnelError(f"no process for the tunnel of {node}: {error}", node=node) from error
        raise AssertionError("unreachable")  # the second attempt has returned or raised

    async def _request_fork(self, node: str, fds: list[int]) -> int:
        """Asks the zygote for one fork, and returns the worker's pid. Raises EOFError when the zygote ends first."""
        self._request_count += 1
        request_id = self._request_count
        pending: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending_forks[request_id] = pending
        try:
            await self._send({"id": request_id, "node": node, "fds": len(fds)}, fds)
            answer = await pending
        finally:
            del self._pending_forks[request_id]
        if "error" in answer:
            raise TunnelError(f"no process for the tunnel of {node}: {answer['error']}", node=node)
        return int(answer["pid"])

    async def _send(self, request: dict[str, object], fds: list[int]) -> None:
        """Sends a request with its descriptors to the zygote, as soon as there is room. Raises EOFError and OSError."""
        while True:
            if self._control is None:
                raise EOFError("the process that starts them has ended")
            try:
                socket.send_fds(self._control, [zygote.encode_line(request)], fds)
                return
            except BlockingIOError:  # hundreds of requests wait; each line is sent as a whole or not at all
                await asyncio.sleep(SEND_RETRY_S)

    def _receive_answers(self, control: socket.socket) -> None:
        """Gives each answer that has come from the zygote to the call that waits for it."""
        try:
            data = control.recv(zygote.READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the zygote was killed: the same as an ordinary end
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(control)
            self._fail_pending_forks("the process that starts them has ended")
            return
        for line in self._answer_lines.feed(data):
            answer = json.loads(line)
            pending = self._pending_forks.get(answer["id"])
            if pending is None:
                continue  # the spawn was cancelled; its worker ends by itself, because its socket is closed
            if not pending.done():
                pending.set_result(answer)

    def _fail_pending_forks(self, reason: str) -> None:
        """Makes all calls that wait for the zygote's answer raise EOFError."""
        for pending in self._pending_forks.values():
            if not pending.done():
                pending.set_exception(EOFError(reason))

    # -- the zygote's life -------------------------------------------------------------------------------------------

    def _start_zygote(self) -> None:
        """Starts the zygote, and receives its answers from now on. Raises TunnelError when it cannot be started."""
        our_end, zygote_end = socket.socketpair()
        with zygote_end:
            try:
                self._process = subprocess.Popen(
                    # -P: so that a file paramiko.py in the user's current folder is not imported.
                    [sys.executable, "-P", "-m", zygote.__name__, str(zygote_end.fileno()), " " * TITLE_ROOM],
                    pass_fds=[zygote_end.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    env=environment.child_environment(),
                    start_new_session=True,  # the terminal's Ctrl-C and hang-up are for the mesh, which drains first
                )
            except OSError as error:
                our_end.close()
                raise TunnelError(f"no process for tunnels could be started: {error}") from error
        our_end.setblocking(False)
        self._control = our_end
        self._answer_lines = LineBuffer()
        asyncio.get_running_loop().add_reader(our_end, self._receive_answers, our_end)

    async def _stop_zygote(self) -> None:
        """Ends the zygote and its workers. Does nothing if no zygote runs."""
        control, process = self._control, self._process
        self._control = self._process = None
        if control is None or process is None:  # both are ``None``, or neither
            return
        asyncio.get_running_loop().remove_reader(control)
        self._fail_pending_forks("the process that starts them was ended")
        try:
            with contextlib.suppress(OSError):  # also TimeoutError, which is an OSError
                control.shutdown(socket.SHUT_WR)  # tells the zygote to end
                async with asyncio.timeout(STOP_TIMEOUT_S):  # the zygote closes its end when all workers have ended
                    while await asyncio.get_running_loop().sock_recv(control, 4096):
                        pass  # an answer for which no call waits any more
        finally:
            control.close()
            process.kill()  # usually the zygote has ended already; if not, it had its time
            process.wait()
