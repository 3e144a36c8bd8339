"""Starts the process of a background mesh (`up -d`) and waits until its sockets listen; stops such a mesh (`down`)."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gpumesh.daemon import leftovers, run_record
from gpumesh.daemon.control_socket import messages
from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.mesh_lock import LockWatch
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.up_options import UpOptions
from gpumesh.errors import GPUMeshError, MeshNotRunning
from gpumesh.state import MeshState

READY_TIMEOUT_S = 20.0  # for the new process to report that its mesh serves
CLOSE_TIMEOUT_S = 10.0  # for closing tunnels and ending workers, after the requests in flight have ended
LOCK_POLL_S = 0.02  # between two looks at the lock of a process that is to end
STATUS_WAIT_S = 0.5  # for the exit status of a process that has closed its pipe, or that reported nothing


def start_background(paths: MeshPaths, options: UpOptions, *, ready_timeout_s: float = READY_TIMEOUT_S) -> int:
    """Starts the background process. Returns its pid when its gateway and its control socket listen.

    Raises the error that the process reports (the text of a ConfigError, MeshAlreadyRunning, a port that is taken), or
    GPUMeshError when the process ends or reports nothing for ``ready_timeout_s`` seconds. Then nothing is left running.
    """
    paths.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    reader, writer = os.pipe()
    # buffering=0: ``_read_ready_message`` reads from the descriptor itself.
    with os.fdopen(reader, "rb", buffering=0) as ready_pipe, paths.stderr_log.open("wb") as stderr_file:
        try:
            process = subprocess.Popen(
                _daemon_command(paths.config, options, writer),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr_file,
                pass_fds=(writer,),
                start_new_session=True,
                # The process inherits our whole environment, from which the mesh reads its secrets.
            )
        finally:
            os.close(writer)  # the process has its own; while ours is open too, the pipe would not end with the process
        try:
            report = _read_ready_message(ready_pipe.fileno(), ready_timeout_s)
            if isinstance(report, messages.Error):
                raise messages.error_from_message(report)
            if report is None:
                raise _no_report_error(process, paths, ready_timeout_s)
        except BaseException:
            _end_process(process)
            raise
    process.returncode = 0  # the child runs on, and nobody waits for it: otherwise Popen's finalizer would warn
    return process.pid


def _daemon_command(config: Path, options: UpOptions, ready_descriptor: int) -> list[str]:
    """Returns the arguments that start ``gpumesh.daemon`` (``daemon/__main__.py``) with these options of `up`."""
    # -P: a folder named gpumesh, or a yaml.py, in the user's working directory must not be imported.
    command = [sys.executable, "-P", "-m", "gpumesh.daemon", str(config), "--ready-fd", str(ready_descriptor)]
    if not options.gateway:
        command.append("--no-gateway")
    if options.listen is not None:
        command.append(f"--listen={options.listen}")
    return command + [f"--node={name}" for name in options.nodes]


def _read_ready_message(descriptor: int, timeout_s: float) -> messages.ControlReply | None:
    """Returns the one message on the pipe; ``None`` when the pipe ends without a message or the time is over."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while not data.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))
        piece = os.read(descriptor, 65536) if readable else b""
        if not piece:
            return None
        data += piece
    return messages.decode_reply(data)


def _no_report_error(process: subprocess.Popen[bytes], paths: MeshPaths, timeout_s: float) -> GPUMeshError:
    """Returns the error for a process that has sent no message, because it is slow or has ended. If the process has
    ended, the error names its exit status and has the last line of its stderr."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(STATUS_WAIT_S)
    if process.returncode is None:
        return GPUMeshError(f"the background mesh said nothing for {timeout_s:.0f} s", hint=f"its log is {paths.log}")
    lines = paths.stderr_log.read_text("utf-8", "replace").strip().splitlines()
    last_line = f": {lines[-1]}" if lines else ""
    return GPUMeshError(
        f"the background mesh ended at once, with status {process.returncode}{last_line}",
        hint=f"its log is {paths.log}; `gpumesh up` without -d shows more",
    )


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Ends the process by SIGTERM, or by SIGKILL after ``CLOSE_TIMEOUT_S``, and waits for its end."""
    process.terminate()
    try:
        process.wait(CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def stop_background(
    paths: MeshPaths, drain_s: float, *, on_state: Callable[[MeshState], None], close_s: float = CLOSE_TIMEOUT_S
) -> bool:
    """Drains and stops the mesh. Returns when its process has ended and its files are removed: True if the process
    ended in order, False if it had to be killed.

    The mesh may drain for ``drain_s`` seconds, and then has ``close_s`` seconds to close. ``on_state`` gets the states
    of the mesh while it drains. Raises MeshNotRunning.
    """
    killed = run_record.find_killed_mesh(paths)
    if killed is not None:
        paths.run_record.unlink(missing_ok=True)  # from now on no mesh is meant to run
    watch = LockWatch.open(paths)
    if watch is None and killed is None:
        raise MeshNotRunning("no mesh is running for this configuration", hint="")  # not the usual hint to start one
    if watch is None or watch.remove_if_stale(paths):
        leftovers.remove_leftovers()
        end = "is not running any more" if killed is None else str(killed)
        raise MeshNotRunning(f"the mesh of this file {end}; what it left behind is removed", hint="")
    with watch:
        pid = watch.pid
        try:
            async with asyncio.timeout(drain_s + close_s):
                was_requested = await _request_down(paths, drain_s, on_state)
                if not was_requested:  # the control socket does not answer, but a signal reaches the process
                    _signal_owner(watch, pid, signal.SIGTERM)
                await _wait_unlocked(watch)
        except TimeoutError:  # the process hangs, or cannot close its tunnels
            _signal_owner(watch, pid, signal.SIGKILL)
            await _wait_unlocked(watch)
            watch.remove_if_stale(paths)
            paths.run_record.unlink(missing_ok=True)
            leftovers.remove_leftovers()
            return False
        watch.remove_if_stale(paths)
        killed = run_record.find_killed_mesh(paths)
        if killed is not None:  # killed in the same moment, by somebody else
            paths.run_record.unlink(missing_ok=True)
            leftovers.remove_leftovers()
            raise MeshNotRunning(f"the mesh of this file {killed}; what it left behind is removed", hint="")
        return True


def _signal_owner(watch: LockWatch, pid: int | None, number: signal.Signals) -> None:
    """Sends the signal to the process ``pid`` if it still holds the lock: later, another process may have its pid."""
    if pid is not None and watch.held:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _wait_unlocked(watch: LockWatch) -> None:
    """Returns when no process holds the lock."""
    while watch.held:  # noqa: ASYNC110  # another process ends: there is no event to wait for
        await asyncio.sleep(LOCK_POLL_S)


async def _request_down(paths: MeshPaths, drain_s: float, on_state: Callable[[MeshState], None]) -> bool:
    """Asks the mesh over its control socket to stop, and gives its states to ``on_state`` until it closes.

    Returns False when no mesh listens: the mesh is closing already, has only just started, or its socket was removed.
    """
    try:
        async for state in RemoteSession(paths.socket).down(drain_s):
            on_state(state)
    except MeshNotRunning:
        return False
    return True
