"""A spare process of a warm command: it becomes the background mesh or the zygote that the command starts.

Each of these two is a Python process whose imports take a third of a second of CPU. A command that is a fork of the
fork server (fork_server.py) has all these modules, but when it starts a program it may have threads and an event loop,
and a fork with those is not safe. So it forks the spare at once, before it does anything. The spare has done nothing
either then, and is a child of the command, as the started program would be.

A command has one spare. Each further program starts as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

DAEMON, ZYGOTE = "gpumesh.daemon", "gpumesh.tunnels.workers.zygote"
_MESSAGE_BYTES = 128 * 1024  # more than arguments and environment take
_FDS = 16
_MOVED_FDS_FROM = 500  # above all numbers that a program is told to use


class SpareProcess:
    """A child of this process that waits to become a program."""

    def __init__(self) -> None:
        self._control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far_end:
            self.pid = os.fork()
            if self.pid == 0:
                self._control.close()
                _wait_and_become(far_end)
        self.is_free = True

    def start(self, request: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Makes it the program of the request. Only its parent's ``Popen`` has to do with it from then on."""
        self.is_free = False
        with self._control:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)

    def end(self) -> None:
        """Ends it, unless it has become a program."""
        if self.is_free:
            self.is_free = False
            self._control.close()
            os.waitpid(self.pid, 0)


def use_spare_process() -> None:
    """Makes a spare process. From now on, ``subprocess.Popen`` starts the first background mesh or zygote in it."""
    spare = SpareProcess()
    atexit.register(spare.end)

    class Popen(subprocess.Popen[Any]):
        def _execute_child(self, args: Any, *others: Any) -> None:
            """Where Popen forks. Its pipes are made then."""
            _executable, _preexec, _close_fds, pass_fds, cwd, env, _startup, _flags, _shell, *pipes = others[:15]
            stdin, _, _, stdout, _, stderr = pipes
            is_known = list(args[:3]) == [sys.executable, "-P", "-m"] and args[3] in (DAEMON, ZYGOTE)
            if not is_known or not spare.is_free:
                super()._execute_child(args, *others)  # type: ignore[misc]
                return
            request = {
                "command": list(args),
                "env": dict(os.environ if env is None else env),
                "cwd": os.fspath(cwd or os.getcwd()),
                "pass_fds": list(pass_fds),
                "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
            }
            streams = [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]
            spare.start(request, [*streams, *pass_fds])
            self.pid = spare.pid
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    subprocess.Popen = Popen  # type: ignore[misc]


def _wait_and_become(control: socket.socket) -> NoReturn:
    """Runs in the spare process: waits for a program to become. The process ends when its parent has ended."""
    os.setsid()  # signals for the command's group, as a Ctrl-C, are not for it
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # who reads what the command writes must see its end
        os.dup2(nothing, number)
    os.close(nothing)
    message, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, _FDS)
    if not message:
        os._exit(0)
    request = json.loads(message)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _MOVED_FDS_FROM) for fd in fds]
    control.detach()
    os.closerange(3, _MOVED_FDS_FROM)
    for fd, number in zip(moved, [0, 1, 2, *request["pass_fds"]], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    module, *arguments = request["command"][3:]
    if module == DAEMON:
        use_spare_process()  # for its zygote
    take_identity(request["command"], request["env"], request["cwd"])
    sys.argv[:] = [module, *arguments]
    run_to_end(_run_daemon if module == DAEMON else _run_zygote)


def _run_daemon() -> None:
    from gpumesh.daemon.__main__ import main

    sys.exit(main())


def _run_zygote() -> None:
    from gpumesh.tunnels.workers.zygote import Zygote

    Zygote(socket.socket(fileno=int(sys.argv[1]))).run()


# -- what a fork needs to be like a started process ------------------------------------------------------------------


def take_identity(command: Sequence[str], env: Mapping[str, str], folder: str) -> None:
    """Gives this process the standard streams of Python on descriptors 0 to 2, the environment, and the folder. In
    ``/proc`` it has this command line and environment."""
    # As Python makes them when it starts: what they are connected to decides whether they can seek.
    for number, (name, mode, buffering) in enumerate((("stdin", "r", -1), ("stdout", "w", -1), ("stderr", "w", 1))):
        before = getattr(sys, name)
        stream = os.fdopen(number, mode, buffering, before.encoding, before.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    # proc(5), /proc/PID/stat, counted from 1: fields 48 to 51 say where arguments and environment were at the start.
    # Nothing in this process reads them any more: Python has copied the arguments, and the new environment is
    # elsewhere.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments_at, arguments_end, environment_at, environment_end = map(int, fields[48 - 3 : 52 - 3])
    _overwrite(arguments_at, arguments_end, command)
    _overwrite(environment_at, environment_end, [f"{name}={value}" for name, value in env.items()])


def _overwrite(start: int, end: int, texts: Sequence[str]) -> None:
    raw = b"".join(os.fsencode(text) + b"\0" for text in texts)
    assert len(raw) <= end - start, f"the fork server has room for {end - start} bytes, of {len(raw)}"
    ctypes.memmove(start, raw.ljust(end - start, b"\0"), end - start)


def run_to_end(main: Callable[[], object]) -> NoReturn:
    """Runs a program, and ends this process as Python ends one, without the last step: to free each object would copy
    all memory that the processes share."""
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
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
