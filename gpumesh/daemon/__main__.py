"""The program of the background mesh: ``python -m gpumesh.daemon``. Only ``background.start_background`` starts it.

The process sends one message of the control socket's protocol through a pipe to its parent: ``End`` when the mesh
serves, or ``Error`` with the reason why it cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from gpumesh import config
from gpumesh.config.changed_file import read_snapshot
from gpumesh.daemon import paths
from gpumesh.daemon.control_socket import messages
from gpumesh.daemon.full_disk import describe_full_folders
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.process import async_runner
from gpumesh.daemon.reload.hangup import reload_at_hangup
from gpumesh.daemon.shutdown import Shutdown, handle_signals
from gpumesh.daemon.up_options import UpOptions, apply_options
from gpumesh.errors import ExitCode, GPUMeshError

log = logging.getLogger(__name__)


class ReadyPipe:
    """The pipe to the parent process, for one message. It is no error if the parent has ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def send(self, message: messages.ControlReply) -> None:
        """Sends the message and closes the pipe. Later calls do nothing."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            os.write(self._descriptor, messages.encode_message(message))
        os.close(self._descriptor)
        self._descriptor = None


async def serve(config_file: Path, options: UpOptions, ready: ReadyPipe) -> None:
    """Runs the mesh of ``config_file`` until SIGTERM, SIGINT or the request ``Down``; SIGHUP makes it read the file
    again. Sends ``End`` when the mesh serves."""
    snapshot = read_snapshot(config.find_config(config_file))
    topology = apply_options(snapshot.topology, options)
    mesh_paths = paths.for_config(config_file)
    lock = MeshLock.acquire(mesh_paths)  # held until this process ends; `down` waits for that
    stop = Shutdown()
    handle_signals(stop, (signal.SIGTERM, signal.SIGINT))
    running = run_mesh(
        topology,
        mesh_paths,
        gateway=options.gateway,
        shutdown=stop,
        lock=lock,
        snapshot=snapshot,
        options=options,
    )
    async with running as session:
        if session.file is not None:
            reload_at_hangup(session.file.request)
        ready.send(messages.End())
        await stop.wait()


def main() -> int:
    """Reads the options, runs the mesh, and returns the exit status. Sends an ``Error`` if the mesh cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m gpumesh.daemon")
    parser.add_argument("config", type=Path)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--no-gateway", action="store_true")
    parser.add_argument("--listen")
    parser.add_argument("--node", action="append", default=[])
    arguments = parser.parse_args()
    options = UpOptions(tuple(arguments.node), not arguments.no_gateway, arguments.listen)
    # The terminal that started the mesh may close. That must not end the mesh. Later, the signal means a reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(arguments.ready_fd, False)
    ready = ReadyPipe(arguments.ready_fd)
    try:
        async_runner.run(serve(arguments.config, options, ready))
    except GPUMeshError as error:
        ready.send(messages.message_from_error(error))
        return int(error.exit_code)
    except asyncio.CancelledError:  # a third signal came (``handle_signals``)
        return int(ExitCode.INTERRUPTED)
    except BaseExceptionGroup as group:
        # The mesh's task groups wrap their errors. The parent shows them in one line; the log has their traces.
        log.critical("the mesh ended", exc_info=group)
        ready.send(
            messages.Error("failed", f"the mesh ended: {describe_error(group)}", "`gpumesh logs` has the details")
        )
        return int(ExitCode.FAILED)
    except Exception as error:
        ready.send(messages.Error("failed", f"the mesh could not start: {describe_error(error)}", hint=""))
        raise  # the trace goes to our stderr, which the parent keeps in a file
    return int(ExitCode.OK)


def describe_error(error: BaseException) -> str:
    """Returns the error in one line; for a group, its errors one after the other, without repetitions."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(describe_error(inner) for inner in error.exceptions))
    if isinstance(error, OSError) and error.strerror:
        file_prefix = f"{error.filename}: " if error.filename else ""
        return f"{file_prefix}{error.strerror}{describe_full_folders(error)}"
    return repr(error)


if __name__ == "__main__":
    sys.exit(main())
