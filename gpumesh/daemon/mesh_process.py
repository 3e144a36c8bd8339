"""The running whole in one process: log, mesh, control socket and gateway, opened in this order, closed in the other.
`up` shows a table over it, the background process only runs it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from gpumesh import config
from gpumesh.daemon import event_log, leftovers
from gpumesh.daemon.control import ControlServer
from gpumesh.daemon.local_session import LocalSession
from gpumesh.daemon.lock import MeshLock
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.process.open_files import raise_file_limit
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning, UsageError
from gpumesh.state import MeshState
from gpumesh.topology import Topology

log = logging.getLogger(__name__)

DRAIN_S = 10.0
JOURNAL_EVERY_S = 0.1
KEEP_EVERY_S = 2.0
HISTORY_EVERY_S = 2.0  # as often as nvidia-smi is asked


@dataclass(frozen=True, slots=True)
class UpOptions:
    """``nodes``: only these, all if empty. ``listen``: instead of what mesh.yaml says, in the
    form of ``config.listen_on``."""

    nodes: tuple[str, ...] = ()
    gateway: bool = True
    listen: str | None = None


class Shutdown:
    """Asked for once or more, by a signal or over the control socket; the first says how long draining may take.

    ``forced``: draining is to end now. ``interrupted``: by a person who pressed Ctrl-C twice.
    """

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.forced = asyncio.Event()
        self.interrupted = False
        self.drain_s = DRAIN_S

    @property
    def requested(self) -> bool:
        return self._asked.is_set()

    def request(self, drain_s: float = DRAIN_S) -> None:
        if not self._asked.is_set():
            self.drain_s = max(drain_s, 0.0)
            self._asked.set()

    def request_within(self, drain_s: float) -> None:
        """As ``request``; where that was asked already, this may make it sooner."""
        if self._asked.is_set():
            asyncio.get_running_loop().call_later(max(drain_s, 0.0), self.force)
        else:
            self.request(drain_s)

    def force(self) -> None:
        self.request(0.0)
        self.forced.set()

    async def wait(self) -> None:
        await self._asked.wait()


def apply_options(topology: Topology, options: UpOptions) -> Topology:
    """The topology as `up`'s arguments narrow it. Raises UsageError."""
    names = [node.name for node in topology.nodes]
    for name in options.nodes:
        if name not in names:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(names)}")
    if options.nodes:
        topology = replace(topology, nodes=tuple(node for node in topology.nodes if node.name in options.nodes))
    if options.listen is not None:
        listen = config.parse_listen_option(options.listen, api_key_env=topology.gateway.api_key_env)
        topology = replace(topology, gateway=replace(topology.gateway, **listen._asdict()))
    return topology


@asynccontextmanager
async def run_mesh(
    topology: Topology,
    paths: MeshPaths,
    *,
    gateway: bool,
    shutdown: Shutdown,
    lock: MeshLock | None = None,
    check_every_s: float = KEEP_EVERY_S,
) -> AsyncGenerator[LocalSession]:
    """Runs the mesh for as long as the context is open; leaving it drains (``stop.drain_s`` at most) and closes.

    The caller holds the mesh's lock (``MeshLock.take``) and keeps it to the end of its process; given here, it and the
    control socket are put back when somebody takes them away.
    """
    from gpumesh.gateway.app import Gateway
    from gpumesh.gateway.observe.access_log import AccessLog
    from gpumesh.mesh.mesh import Mesh

    async with AsyncExitStack() as stack:
        stack.enter_context(raise_file_limit())
        stack.callback(_remove, paths, lock)
        handler = event_log.start_log(paths.log)
        stack.callback(event_log.stop_log, handler)
        stack.push(_say_why)
        leftovers.remove_leftovers()
        log.info("the mesh %s starts; nodes: %d", topology.name, len(topology.nodes), extra={"event": "start"})
        stack.callback(log.info, "the mesh %s ended", topology.name, extra={"event": "end"})
        mesh = await stack.enter_async_context(Mesh(topology))
        session = LocalSession(mesh)
        writing = asyncio.create_task(_write_journal(session), name="journal")
        stack.push_async_callback(_ended, writing)
        recording = asyncio.create_task(_keep_history(session), name="history")
        stack.push_async_callback(_ended, recording)
        control = await stack.enter_async_context(ControlServer(session, paths.socket, on_stop=shutdown.request_within))
        if lock is not None:
            keeping = asyncio.create_task(_keep_reachable(control, lock, paths, shutdown, check_every_s), name="keeper")
            stack.push_async_callback(_ended, keeping)
        async with AsyncExitStack() as serving:
            if gateway:
                access_log = AccessLog(paths.access_log) if topology.gateway.access_log else None
                gate = Gateway(mesh, access_log=access_log, stop_now=shutdown.forced)
                server = await serving.enter_async_context(gate)
                log.info("the gateway serves at %s", server.listen_description, extra={"event": "gateway"})
            # What is loaded by now stays. Each full collection would look through it: 10 ms in which no token moves.
            gc.collect()
            gc.freeze()
            serving.callback(gc.unfreeze)
            yield session
            session.refuse_new_prompts()
            log.info("draining, %.0f s at most", shutdown.drain_s, extra={"event": "drain"})
            if gateway:
                server.drain_s = shutdown.drain_s
            began = asyncio.get_running_loop().time()
        spent_s = asyncio.get_running_loop().time() - began
        await wait_drained(session, max(shutdown.drain_s - spent_s, 0.0), shutdown.forced)


def _remove(paths: MeshPaths, lock: MeshLock | None) -> None:
    if lock is None or lock.still_owns(paths):  # else they are another mesh's by now
        paths.remove_files()


def _say_why(_kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
    """What ends a mesh must stand in its log, while that is still open: later there is nobody to tell."""
    if isinstance(error, GPUMeshError):
        log.error("the mesh ends: %s", error.message, extra={"event": "failed", "node": error.node})
    elif isinstance(error, Exception):
        log.critical("the mesh ends, by a fault of gpumesh's own", exc_info=error, extra={"event": "failed"})


async def wait_drained(session: LocalSession, timeout_s: float, hurried: asyncio.Event) -> None:
    """Returns when nothing is in flight or waits any more, or the time is over, or ``hurried`` is set."""

    async def ended() -> None:
        async with aclosing(session.watch(0.05)) as states:
            async for state in states:
                if not count_in_flight(state):
                    return

    either = [asyncio.ensure_future(ended()), asyncio.ensure_future(hurried.wait())]
    try:
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in either:
            one.cancel()
        await asyncio.gather(*either, return_exceptions=True)
    if left := count_in_flight(session.mesh.snapshot()):
        log.warning("what did not end in time is cut; requests: %d", left)


def count_in_flight(state: MeshState) -> int:
    return state.gateway.in_flight + state.gateway.queued


async def _write_journal(session: LocalSession) -> None:
    last: MeshState | None = None
    async with aclosing(session.watch(JOURNAL_EVERY_S)) as states:
        async for state in states:
            for event in event_log.compare_states(last, state):
                event_log.log_event(event)
            last = state


async def _keep_history(session: LocalSession) -> None:
    while True:
        await asyncio.sleep(HISTORY_EVERY_S)
        session.recorder.add(await session.status())


async def _keep_reachable(
    control: ControlServer, lock: MeshLock, paths: MeshPaths, stop: Shutdown, every_s: float
) -> None:
    """A mesh that nobody could ask or stop any more would hold its ports for ever."""
    told = False
    while True:
        await asyncio.sleep(every_s)
        try:
            lock.restore_file(paths)
            await control.restore_socket()
        except MeshAlreadyRunning as error:
            said = error.message
            log.error("this mesh ends: its lock was taken away, and now %s", said, extra={"event": "failed"})  # noqa: TRY400
            stop.request()
            return
        except (GPUMeshError, OSError) as error:
            if not told:
                log.warning("no command can reach this mesh: %s", error, extra={"event": "unreachable"})
            told = True
        else:
            told = False


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
