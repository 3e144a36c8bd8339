"""Worker processes, forked in milliseconds from one zygote that has the slow imports behind it.

A connection lives in a process of its own (facts: tunnel-latency.md: in the gateway's process it would share the GIL).
Starting Python and importing paramiko takes a third of a second; so one single-threaded *zygote* does it once, freezes
its heap, and forks a worker for each connection. It is single-threaded, because forking with threads is not safe; it
is a process of its own, because the mesh has threads and an event loop.

Nothing outlives the mesh: zygote and workers end when their socket ends, and on Linux also by PR_SET_PDEATHSIG (the
worker's parent is the zygote, whose parent is the mesh), should they be too busy to read it. Secrets travel over the
socket only. A dead zygote takes its workers along; the next ``spawn`` starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from gpumesh.config import environment
from gpumesh.errors import TunnelDown, TunnelError
from gpumesh.tunnels.local_system import child_process
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.workers.protocol import FromWorker, ToWorker, decode_message, encode_message

LINE_LIMIT = 4 << 20  # bytes of one JSON line; a worker sends a command's output in far smaller pieces
SPAWN_TIMEOUT_S = 20.0  # a cold start imports paramiko, on a loaded machine
STOP_TIMEOUT_S = 3.0
FULL_S = 0.005  # until it is looked again whether there is room for a request
TITLE_ROOM = 64  # characters for a process title to overwrite


class WorkerHandle:
    """One worker, from the mesh's side. ``close`` it (or leave ``async with``) whatever happened to the process."""

    def __init__(
        self, node: str, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pool: WorkerPool
    ) -> None:
        self.node = node
        self.pid = pid
        self._reader = reader
        self._writer = writer
        self._pool = pool

    async def send(self, message: ToWorker) -> None:
        """Raises ``TunnelDown`` when the worker is gone."""
        if self._writer.is_closing() or self._reader.at_eof():
            raise TunnelDown(f"the tunnel's process of {self.node} has ended", node=self.node)
        try:
            self._writer.write(encode_message(message))
            await self._writer.drain()
        except (ConnectionError, OSError) as error:
            raise TunnelDown(f"the tunnel's process of {self.node} has ended", node=self.node) from error

    async def receive(self) -> FromWorker | None:
        """The worker's next message; ``None`` when there will be none any more. Only one task may wait here."""
        try:
            line = await self._reader.readline()
        except (ConnectionError, OSError, ValueError):  # ValueError: a line beyond LINE_LIMIT
            return None
        if not line.endswith(b"\n"):
            return None  # the process ended within a line
        return decode_message(line)  # type: ignore[return-value]  # a worker sends only FromWorker

    def kill(self) -> None:
        """Ends the process at once (SIGKILL), and all that it forwards. Harmless when it is gone already."""
        self._pool.kill(self.pid)

    async def close(self) -> None:
        """Closes the socket, which ends the worker if it is still there."""
        self._writer.close()
        with contextlib.suppress(ConnectionError, OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> WorkerHandle:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class WorkerPool:
    """``async with WorkerPool() as pool: worker = await pool.spawn(setup, listeners)``.

    The zygote starts at the first ``spawn`` (or ``prestart``). On leaving, it and every worker are gone.
    ``stderr`` is where a crash of theirs is written (as for ``subprocess``).
    """

    def __init__(self, *, stderr: int | None = subprocess.DEVNULL) -> None:
        self._stderr = stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._requests = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._begun = b""  # of an answer's line

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
        """Starts the zygote now, so that the first ``spawn`` is as quick as the others."""
        if self._control is None:
            self._start_zygote()

    async def spawn(self, setup: ConnectRequest, listeners: Sequence[socket.socket]) -> WorkerHandle:
        """A new worker that has got ``setup``, with its own copies of ``listeners`` (which stay the caller's).

        Raises ``TunnelError`` when no process can be started.
        """
        here, there = socket.socketpair()
        try:
            with there:
                pid = await self._fork(setup.node, [there, *listeners])
            reader, writer = await asyncio.open_unix_connection(sock=here, limit=LINE_LIMIT)
        except BaseException:  # cancelled, too: the worker, if there is one, sees its socket end
            here.close()
            raise
        handle = WorkerHandle(setup.node, pid, reader, writer, self)
        try:
            await handle.send(setup)
        except BaseException:
            await handle.close()
            raise
        return handle

    def kill(self, pid: int) -> None:
        """SIGKILL for a worker. Through the zygote: only it knows whether the pid is still that worker's."""
        if self._control is None:
            return
        with contextlib.suppress(OSError):
            self._control.send(_line({"kill": pid}))

    # -- internals ---------------------------------------------------------------------------------------------------

    async def _fork(self, node: str, sockets: Sequence[socket.socket]) -> int:
        """Not one after the other: those that are asked for together are made together."""
        for attempt in (1, 2):
            if self._control is None:
                self._start_zygote()
            control = self._control
            try:
                async with asyncio.timeout(SPAWN_TIMEOUT_S):
                    return await self._ask(node, [sock.fileno() for sock in sockets])
            except (OSError, EOFError) as error:  # TimeoutError is an OSError
                if self._control is control:  # else another spawn has seen it first
                    await self._stop_zygote()
                if attempt == 2:
                    raise TunnelError(f"no process for the tunnel of {node}: {error}", node=node) from error
        raise AssertionError("unreachable")

    async def _ask(self, node: str, fds: list[int]) -> int:
        self._requests += 1
        number = self._requests
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            await self._send({"id": number, "node": node, "fds": len(fds)}, fds)
            said = await answer
        finally:
            del self._answers[number]
        if "error" in said:
            raise TunnelError(f"no process for the tunnel of {node}: {said['error']}", node=node)
        return int(said["pid"])

    async def _send(self, request: dict[str, object], fds: list[int]) -> None:
        while True:
            if self._control is None:
                raise EOFError("the process that starts them has ended")
            try:
                socket.send_fds(self._control, [_line(request)], fds)
                return
            except BlockingIOError:  # hundreds are waiting; a line is sent whole or not at all
                await asyncio.sleep(FULL_S)

    def _heard(self, control: socket.socket) -> None:
        try:
            said = control.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        if not said:
            asyncio.get_running_loop().remove_reader(control)
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(EOFError("the process that starts them has ended"))
            return
        *lines, self._begun = (self._begun + said).split(b"\n")
        for line in lines:
            told = json.loads(line)
            waiting = self._answers.get(told["id"])  # else of a spawn that was cancelled: that worker has ended
            if waiting is not None and not waiting.done():
                waiting.set_result(told)

    def _start_zygote(self) -> None:
        here, there = socket.socketpair()
        with there:
            try:
                self._process = subprocess.Popen(
                    # -P: a paramiko.py in the folder where the user happens to be is not ours.
                    [sys.executable, "-P", "-m", __name__, str(there.fileno()), " " * TITLE_ROOM],
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    env=environment.child_environment(),
                    start_new_session=True,  # the terminal's Ctrl-C and hang-up are for the mesh, which drains first
                )
            except OSError as error:
                here.close()
                raise TunnelError(f"no process for tunnels could be started: {error}") from error
        here.setblocking(False)
        self._control = here
        self._begun = b""
        asyncio.get_running_loop().add_reader(here, self._heard, here)

    async def _stop_zygote(self) -> None:
        control, process = self._control, self._process
        self._control = self._process = None
        if control is None or process is None:
            return
        asyncio.get_running_loop().remove_reader(control)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EOFError("the process that starts them was ended"))
        try:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    while await asyncio.get_running_loop().sock_recv(control, 4096):
                        pass
        finally:
            control.close()
            process.kill()  # ended already, as a rule; and if not, there is nothing more to wait for
            process.wait()


def _line(document: dict[str, object]) -> bytes:
    return json.dumps(document).encode() + b"\n"


# -- the zygote's side -----------------------------------------------------------------------------------------------


class Zygote:
    """Forks on request, reaps, and ends all its workers when the mesh ends. Single-threaded, no event loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._fds: list[int] = []

    def run(self) -> None:
        child_process.die_with_parent()
        child_process.set_title("gpumesh tunnels")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Imported here, not above: the mesh itself imports this module, and must not load paramiko for it.
        from gpumesh.tunnels.workers import worker

        self._work = worker.main
        gc.collect()
        gc.freeze()  # so that no collection in a worker copies the pages that all of them share

        wake_out, wake_in = os.pipe()
        os.set_blocking(wake_out, False)
        os.set_blocking(wake_in, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        buffer = b""
        answers = b""
        while True:
            watched: list[Any] = [self._control, wake_out]
            # Those that are asked for together are all made before any is told of, which sets it to work: or the first
            # would take the processor from making the last.
            ready = select.select(watched, [], [], 0.0 if answers else None)[0]
            if not ready:
                with contextlib.suppress(OSError):
                    self._control.sendall(answers)
                answers = b""
            if wake_out in ready:
                os.read(wake_out, 4096)
                self._reap()
            if self._control in ready:
                data, fds, _, _ = socket.recv_fds(self._control, 65536, 253)
                self._fds += fds
                if not data:
                    break
                buffer += data
                while b"\n" in buffer:
                    line, buffer = buffer.split(b"\n", 1)
                    answers += self._obey(json.loads(line))
        self._end_children()

    def _obey(self, request: dict[str, Any]) -> bytes:
        """What to answer."""
        if "kill" in request:
            if request["kill"] in self._children:
                os.kill(request["kill"], signal.SIGKILL)
            return b""
        fds, self._fds = self._fds[: request["fds"]], self._fds[request["fds"] :]
        try:
            parent = os.getpid()
            pid = os.fork()
        except OSError as error:
            answer: dict[str, object] = {"id": request["id"], "error": str(error)}
        else:
            if pid == 0:
                self._be_worker(request["node"], fds, parent)
            self._children.add(pid)
            answer = {"id": request["id"], "pid": pid}
        finally:
            for fd in fds:
                os.close(fd)
        return _line(answer)

    def _be_worker(self, node: str, fds: list[int], parent: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child_process.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)
            child_process.set_title(f"gpumesh tunnel {node}")
            self._control.close()
            for fd in self._fds:  # of the next one
                os.close(fd)
            control, *listeners = [socket.socket(fileno=fd) for fd in fds]
            status = self._work(control, listeners)
        except BaseException:  # the process ends here; what went wrong goes to stderr
            traceback.print_exc()
        finally:
            # Not sys.exit: the zygote's stack is above us, and threads left behind must not keep the process.
            os._exit(status)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._children.discard(pid)

    def _end_children(self) -> None:
        for sign, patience_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 1.0)):
            for pid in self._children:
                os.kill(pid, sign)
            deadline = time.monotonic() + patience_s
            while self._children and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.005)


if __name__ == "__main__":
    Zygote(socket.socket(fileno=int(sys.argv[1]))).run()
