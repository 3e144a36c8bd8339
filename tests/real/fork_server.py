"""The process that has imported all modules of `gpumesh` and forks a process for each command (warm_commands.py).

It has one thread, because a fork with threads is not safe.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

_CLONE_NEWNET = 0x40000000  # sched.h; os.setns needs Python 3.12
_MESSAGE_BYTES = 128 * 1024  # more than arguments and environment take
_FDS = 5


@dataclass(frozen=True)
class Command:
    """One that runs. ``status`` is the socket that gets its exit code; ``ended`` is readable when it has ended."""

    pid: int
    status: socket.socket
    ended: int


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks a process for each request, until the tests close their end; ``None`` then.

    In the new process it returns the request, and nothing of this server is open there.
    """
    running: list[Command] = []
    while True:
        watched: list[Any] = [control]
        for command in running:
            watched += [command.ended, command.status]
        ready, _, _ = select.select(watched, [], [])
        for command in [command for command in running if {command.ended, command.status} & set(ready)]:
            running.remove(command)
            _finish(command)
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, _FDS)
            if not message:
                return None
            status = socket.socket(fileno=fds.pop(0))
            pid = os.fork()
            if pid == 0:
                for resource in (control, status, *(command.status for command in running)):
                    resource.close()
                for command in running:
                    os.close(command.ended)
                return {**json.loads(message), "fds": fds}
            for fd in fds:
                os.close(fd)
            running.append(Command(pid, status, os.pidfd_open(pid)))


def _finish(command: Command) -> None:
    """Sends the exit code of a command. Kills a command that still runs: the tests have closed the socket first."""
    with command.status, contextlib.suppress(OSError):
        if os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(command.pid, signal.SIGKILL)
        _, status = os.waitpid(command.pid, 0)
        command.status.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os.close(command.ended)


def become(request: dict[str, Any]) -> None:
    """Gives this process what the started command would have: streams, network, environment, folder and arguments."""
    stdin, stdout, stderr, *network = request["fds"]
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
    # As Python makes them when it starts: what they are connected to decides whether they can seek.
    for number, (name, mode, buffering) in enumerate((("stdin", "r", -1), ("stdout", "w", -1), ("stderr", "w", 1))):
        before = getattr(sys, name)
        stream = os.fdopen(number, mode, buffering, before.encoding, before.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for fd in network:
        if os.fstat(fd).st_ino != os.stat("/proc/self/ns/net").st_ino:
            result = ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET)
            assert result == 0, os.strerror(ctypes.get_errno())
    for fd in request["fds"]:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["command"]


def run_command() -> NoReturn:
    """Runs the command line, and ends this process as Python ends one, without the last step: to free each object would
    copy all memory that the processes share."""
    from gpumesh.cli.main import main

    code = 0
    try:
        main()
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # what warns when it is freed does it now
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as Python
    sys.stderr.flush()
    os._exit(code)


def import_commands() -> None:
    """Imports all of the package but the lab, which one command needs, and what only a tunnel's process imports."""
    import gpumesh

    others = ("gpumesh.lab", "gpumesh.tunnels.inprocess", "gpumesh.tunnels.workers.worker")
    for module in pkgutil.walk_packages(gpumesh.__path__, "gpumesh."):
        if not module.name.startswith(others) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


if __name__ == "__main__":
    if os.fork() != 0:
        os._exit(0)  # so that the other process is no child of the tests
    with socket.socket(fileno=int(sys.argv[1])) as near_end:
        import_commands()
        gc.collect()
        gc.freeze()  # so that a collection in a command does not copy the memory that all share
        started = serve(near_end)
    if started is not None:
        become(started)
        run_command()
