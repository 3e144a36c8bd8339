"""The process that has imported all modules of `gpumesh` and forks a process for each command (warm_commands.py).
The background mesh and the zygote that a command starts are forks too (spare_process.py).

It has one thread, because a fork with threads is not safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import termios
from dataclasses import dataclass
from typing import Any, NoReturn

from tests.real.spare_process import run_to_end, take_identity, use_spare_process

LAB_HOST = "gpumesh.lab.host"  # as a command: this program instead of `gpumesh`
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
    """Forks a process for each request, until the tests close their end; ``None`` then. The request's socket gets the
    pid on a line, and then the exit code.

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
            request = json.loads(message)
            if request["command"][0] == LAB_HOST:
                import_lab_host()
            pid = os.fork()
            if pid == 0:
                for resource in (control, status, *(command.status for command in running)):
                    resource.close()
                for command in running:
                    os.close(command.ended)
                return {**request, "fds": fds}
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(OSError):  # the tests have closed the socket: ``_finish`` is next
                status.sendall(f"{pid}\n".encode())
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
    """Gives this process what the started command would have: streams, terminal, network, environment, folder and
    arguments. A spare process is made for what the command starts."""
    stdin, stdout, stderr, *network = request["fds"]
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
    for fd in network:
        if os.fstat(fd).st_ino != os.stat("/proc/self/ns/net").st_ino:
            result = ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET)
            assert result == 0, os.strerror(ctypes.get_errno())
    for fd in request["fds"]:
        os.close(fd)
    if request["command"][0] != LAB_HOST:
        use_spare_process()
    if request["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    take_identity(request["command"], request["env"], request["cwd"])
    sys.argv[:] = request["command"]


def run_command() -> NoReturn:
    """Runs the command line, or a host of the lab, and ends this process."""
    if sys.argv[0] == LAB_HOST:
        from gpumesh.lab.host import main as run_host

        run_to_end(run_host)
    from gpumesh.cli.main import main

    run_to_end(main)


def import_commands() -> None:
    """Imports all of the package but the lab, which one command needs."""
    import gpumesh

    sys.modules["invoke"] = None  # type: ignore[assignment]  # as gpumesh/tunnels/workers/zygote.py
    for module in pkgutil.walk_packages(gpumesh.__path__, "gpumesh."):
        if not module.name.startswith("gpumesh.lab") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("gpumesh.daemon.__main__")


@functools.cache
def import_lab_host() -> None:
    """Only for the tests that need it."""
    importlib.import_module(LAB_HOST)
    gc.collect()
    gc.freeze()


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
