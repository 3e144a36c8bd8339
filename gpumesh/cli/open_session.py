"""Runs the asynchronous part of a command, and opens a Session on the running mesh or on a mesh in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from gpumesh.cli.global_options import GlobalOptions

if TYPE_CHECKING:
    from gpumesh.daemon.sessions.local_session import LocalSession
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.topology import Topology

T = TypeVar("T")


def run_async(main: Coroutine[Any, Any, T], *, use_uvloop: bool = False) -> T:
    """Runs the coroutine to its end, and returns its result. Ctrl-C cancels the coroutine, which also ends its work on
    the hosts; then the command exits with 130.

    ``use_uvloop`` is for a command that may run a mesh for minutes: for a short command, the import of uvloop would not
    pay."""
    try:
        from gpumesh.daemon.process import async_runner

        return async_runner.run(main, use_uvloop=use_uvloop)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        main.close()  # Ctrl-C may come before the coroutine begins; Python would warn that it was never awaited


@asynccontextmanager
async def open_session(
    options: GlobalOptions,
    *,
    embed: bool = True,
    announce_change: bool = True,
    change_topology: Callable[[Topology], Topology] = lambda topology: topology,
) -> AsyncGenerator[Session]:
    """Opens a Session on the running mesh of this configuration; if no mesh runs, on a mesh that runs in this process
    while the context is open.

    If mesh.yaml was changed after the running mesh had read it, a line on stderr says so, unless ``announce_change`` is
    false because the caller says so itself. ``change_topology`` changes what a mesh in this process gets of mesh.yaml.
    Raises MeshNotRunning when no mesh runs and ``embed`` is false.
    """
    from gpumesh.cli.views import changed_file, killed_mesh
    from gpumesh.config.changed_file import ChangedFile
    from gpumesh.daemon.control_socket.client_errors import MeshEnded
    from gpumesh.daemon.control_socket.remote_session import RemoteSession
    from gpumesh.daemon.mesh_lock import LockWatch
    from gpumesh.errors import MeshNotRunning

    paths = options.paths()
    watch = LockWatch.open(paths)
    if watch is not None:  # there is a lock file: a mesh runs, or has crashed
        with watch:
            lock_was_stale = watch.remove_if_stale(paths)
        if not lock_was_stale and await _accepts_connections(paths.socket):
            session = RemoteSession(paths.socket)
            if announce_change and not options.quiet:
                changed_file.print_finding(ChangedFile(paths.config, await session.configuration()).find())
            try:
                yield session
            except (MeshEnded, MeshNotRunning) as error:
                raise killed_mesh.explain_end(paths, error) from error
            return
    if not embed:
        raise killed_mesh.explain_end(paths, MeshNotRunning("no mesh is running for this configuration"))
    async with open_local_session(options, change_topology(options.topology())) as local_session:
        yield local_session


@asynccontextmanager
async def open_local_session(options: GlobalOptions, topology: Topology) -> AsyncGenerator[LocalSession]:
    """Opens a Session on a mesh that runs in this process while the context is open, also if another mesh runs."""
    from gpumesh.daemon import leftovers
    from gpumesh.daemon.sessions.local_session import LocalSession
    from gpumesh.mesh.learned_state import LearnedState
    from gpumesh.mesh.mesh import Mesh

    leftovers.remove_leftovers()
    # A mesh for one command profits from what earlier meshes have learned. It sees too little to add to it.
    learned = LearnedState(options.paths().learned, read_only=True)
    async with Mesh(topology, learned=learned) as mesh:
        yield LocalSession(mesh)


async def running_topology(session: Session, options: GlobalOptions) -> Topology:
    """What the mesh of this session has read from its mesh.yaml: the file may have changed since; and the nodes of its
    pools. If the mesh is of an older version, which does not tell, what mesh.yaml says now. Raises ConfigError."""
    snapshot = await session.configuration()
    return options.topology() if snapshot is None else snapshot.running_topology


async def _accepts_connections(socket: Path) -> bool:
    """Whether the mesh listens on its control socket. While it starts or ends, it does not."""
    import asyncio

    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:  # there is no socket, or nobody listens at it
        return False
    writer.close()
    await writer.wait_closed()
    return True
