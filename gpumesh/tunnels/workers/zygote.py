"""The zygote: a single-threaded process that has imported paramiko and forks a worker process for each connection.

Starting Python and importing paramiko takes a third of a second; a fork takes milliseconds. The zygote imports once,
freezes its heap, and forks on request. It has one thread only, because a fork with threads is not safe. It is a process
of its own, because the mesh has threads and an event loop. worker_pool.py starts the zygote and sends it requests.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from gpumesh.text.lines import LineBuffer
from gpumesh.tunnels.local_system import child_process

READ_BYTES = 64 * 1024  # the most that one read of the control socket takes
MAX_FDS = 253  # descriptors in one message: the kernel's SCM_MAX_FD
END_PATIENCE_S = 1.0  # the time for workers to end after SIGTERM, and again after SIGKILL


def encode_line(document: dict[str, object]) -> bytes:
    """A request to the zygote, or the zygote's answer: one line of JSON, with its newline."""
    return json.dumps(document).encode() + b"\n"


class Zygote:
    """Forks workers on request, reaps them, and ends all workers when the mesh ends.

    There are two requests:

    - ``{"id", "node", "fds"}`` forks a worker. It comes with ``fds`` file descriptors: the worker's control socket,
      then its listeners. The answer is ``{"id", "pid"}`` or ``{"id", "error"}``.
    - ``{"kill": pid}`` kills a worker, and has no answer.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._received_fds: list[int] = []
        self._requests = LineBuffer()

    def __repr__(self) -> str:
        return f"<Zygote {os.getpid()} {len(self._children)} workers>"

    def run(self) -> None:
        """Serves requests until the mesh closes its end of the control socket."""
        child_process.die_with_parent()
        child_process.set_title("gpumesh tunnels")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the mesh, which then ends the zygote
        # paramiko imports invoke, if it is there, to run the commands of "Match exec" in an ssh configuration. A worker
        # reads no such file, and the import would be a quarter of the zygote's start. ``None`` makes the import fail.
        sys.modules["invoke"] = None  # type: ignore[assignment]
        gc.disable()  # nothing that is imported is garbage
        # Imported here: the mesh imports this module too, and must not load paramiko.
        from gpumesh.tunnels.workers import worker

        self._worker_main = worker.main
        gc.collect()
        gc.freeze()  # so that a collection in a worker does not copy the memory that all workers share
        gc.enable()
        self._serve_requests(_open_signal_pipe(signal.SIGCHLD))
        self._end_children()

    def _serve_requests(self, child_ended_fd: int) -> None:
        """Handles requests until the mesh closes its end. ``child_ended_fd`` is readable when a worker has ended."""
        answers = b""
        while True:
            # Answers wait until no more requests are there: workers that were requested together are all forked first.
            # After an answer the mesh lets that worker connect, which would take the processor from the next forks.
            # So with answers to send, select only looks (0.0) and does not wait (``None``).
            watched: list[Any] = [self._control, child_ended_fd]
            ready, _, _ = select.select(watched, [], [], 0.0 if answers else None)
            if not ready:
                with contextlib.suppress(OSError):  # the mesh has ended: then the next read ends this loop
                    self._control.sendall(answers)
                answers = b""
            if child_ended_fd in ready:
                os.read(child_ended_fd, 4096)
                self._reap_children()
            if self._control in ready:
                data, fds, _flags, _sender = socket.recv_fds(self._control, READ_BYTES, MAX_FDS)
                self._received_fds += fds
                if not data:  # the mesh has closed its end
                    return
                for line in self._requests.feed(data):
                    answers += self._handle_request(json.loads(line))

    def _handle_request(self, request: dict[str, Any]) -> bytes:
        """Kills or forks a worker, and returns the answer; empty for a kill."""
        if "kill" in request:
            pid = request["kill"]
            if pid in self._children:  # otherwise the worker has ended, and the pid may be another process's
                os.kill(pid, signal.SIGKILL)
            return b""
        return self._fork_worker(request)

    def _fork_worker(self, request: dict[str, Any]) -> bytes:
        """Forks a worker, and returns the answer: the worker's pid, or the error. Returns in the zygote only."""
        count = request["fds"]  # the descriptors come in the order of the requests
        fds, self._received_fds = self._received_fds[:count], self._received_fds[count:]
        try:
            parent = os.getpid()
            pid = os.fork()
        except OSError as error:
            answer: dict[str, object] = {"id": request["id"], "error": str(error)}
        else:
            if pid == 0:  # this is the worker, and it ends inside this call
                self._run_worker(request["node"], fds, parent)
            self._children.add(pid)
            answer = {"id": request["id"], "pid": pid}
        finally:
            for fd in fds:
                os.close(fd)
        return encode_line(answer)

    def _run_worker(self, node: str, fds: list[int], parent: int) -> NoReturn:
        """Runs a worker in the forked process, and ends the process. ``parent`` is the zygote's pid."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)  # the pipe of ``_open_signal_pipe`` is for the zygote
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child_process.die_with_parent(parent)
            child_process.set_title(f"gpumesh tunnel {node}")
            self._control.close()
            for fd in self._received_fds:  # these descriptors belong to later requests
                os.close(fd)
            control, *listeners = [socket.socket(fileno=fd) for fd in fds]
            status = self._worker_main(control, listeners)
        except BaseException:  # the process ends here; the traceback goes to stderr
            traceback.print_exc()
        finally:
            # Not sys.exit: that would unwind the zygote's stack, and would wait for threads that are left.
            os._exit(status)

    def _reap_children(self) -> None:
        """Reaps and forgets all workers that have ended."""
        while self._children:
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # no child is left. Not expected while we remember one, but no reason to crash
                return
            if pid == 0:  # all other workers still run
                return
            self._children.discard(pid)

    def _end_children(self) -> None:
        """Ends all workers: first by SIGTERM, then the workers that are left by SIGKILL."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._children:
                os.kill(pid, signal_number)
            deadline = time.monotonic() + END_PATIENCE_S
            while self._children and time.monotonic() < deadline:
                self._reap_children()
                time.sleep(0.005)


def _open_signal_pipe(signal_number: int) -> int:
    """Returns a descriptor that becomes readable each time the signal comes."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal_number, lambda *_: None)  # without a handler Python writes nothing into the pipe
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # a full pipe is readable, which is enough
    return reader


if __name__ == "__main__":
    Zygote(socket.socket(fileno=int(sys.argv[1]))).run()
