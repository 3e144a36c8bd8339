"""Decides on which way `bench run` sends its prompts, and opens what the way needs: a gateway, the load generator."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from gpumesh.bench.load.conditions import Via
    from gpumesh.bench.load.load_sources import LoadSource
    from gpumesh.bench.load.routes import ApiKeys
    from gpumesh.bench.load.send_prompt import SendPrompt
    from gpumesh.cli.global_options import GlobalOptions
    from gpumesh.daemon.sessions.session import Session
    from gpumesh.topology import Topology


@dataclass(frozen=True, slots=True)
class LoadWay:
    """The source of the load, and notes on why it is another than usual."""

    load: LoadSource
    notes: tuple[str, ...] = ()


def parse_via(text: str | None) -> Via | None:
    """The way of this name; ``None``: the usual one. Raises UsageError for an unknown name."""
    from gpumesh.bench.load.conditions import Via

    choices = (Via.GATEWAY, Via.MESH, Via.DIRECT)
    if text is not None and text not in choices:
        raise UsageError(f"--via {text!r} is none of: {', '.join(choices)}")
    return None if text is None else Via(text)


@asynccontextmanager
async def gateway_for_run() -> AsyncGenerator[Callable[[Topology], Topology]]:
    """Yields a function that gives the mesh of this command a gateway of its own: on a Unix socket in a private folder,
    without keys. So nobody else can use it, and nothing of mesh.yaml can be in its way (a port that is taken, a key
    whose variable is not set here). The next mesh removes the folder of a command that was killed.
    """
    from gpumesh.tunnels.local_system.socket_folders import private_folder

    def give_gateway(topology: Topology, host: str | None, socket: Path | None) -> Topology:
        gateway = replace(topology.gateway, host=host, port=0, socket=socket)
        return replace(topology, gateway=replace(gateway, api_key_env=None, keys=(), access_log=False))

    if sys.platform == "win32":  # asyncio has no Unix sockets there
        yield lambda topology: give_gateway(topology, "127.0.0.1", None)
        return
    with private_folder() as folder:
        yield lambda topology: give_gateway(topology, None, folder / "gateway.sock")


@asynccontextmanager
async def open_load(
    session: Session, options: GlobalOptions, topology: Topology, via: Via | None, keys: ApiKeys, send: SendPrompt
) -> AsyncGenerator[LoadWay]:
    """Opens the way ``via`` (``None``: through the gateway if there is one that can be used, else as `run` does).

    ``send`` sends through the session. Raises UsageError if the mesh has no such way.
    """
    from gpumesh.bench.load.conditions import Via
    from gpumesh.bench.load.load_sources import LoadOfGenerator, LoadOfThisProcess
    from gpumesh.bench.load.own_process.generator_link import GeneratorProcess
    from gpumesh.daemon.sessions.local_session import LocalSession

    embedded = isinstance(session, LocalSession)
    mesh_pid = _mesh_pid(options, embedded=embedded)
    async with AsyncExitStack() as stack:
        if isinstance(session, LocalSession):
            from gpumesh.gateway.app import Gateway

            gateway = Gateway(session.mesh, drain_s=0.0)  # the requests of a run that is cancelled have no reader
            await stack.enter_async_context(gateway)
        state = await session.status()
        problem = None
        if state.gateway.url is None:
            problem = "the mesh has no gateway"
        elif topology.gateway.needs_key and keys.gateway is None:
            names = ", ".join(topology.gateway.key_variables) or "a key"
            problem = f"the gateway needs an API key, and this command has none ({names})"
        notes: list[str] = []
        if via is None and problem is not None:
            notes.append(f"{problem}: the prompts went to the mesh by its control socket, from this process")
        elif via is Via.GATEWAY and problem is not None:
            raise UsageError(problem, hint="add `--via mesh`")
        chosen = via or (Via.MESH if problem is not None else Via.GATEWAY)
        if chosen is Via.MESH:
            yield LoadWay(LoadOfThisProcess(send, None if embedded else mesh_pid), tuple(notes))
            return
        process = await stack.enter_async_context(GeneratorProcess())
        yield LoadWay(LoadOfGenerator(process, chosen, keys, mesh_pid), tuple(notes))


def _mesh_pid(options: GlobalOptions, *, embedded: bool) -> int | None:
    """The process of the mesh; ``None`` if it is not known."""
    import os

    from gpumesh.daemon.mesh_lock import LockWatch

    if embedded:
        return os.getpid()
    watch = LockWatch.open(options.paths())
    if watch is None:
        return None
    with watch:
        return watch.pid
