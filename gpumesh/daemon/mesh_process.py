"""Runs a whole mesh in this process: opens log, mesh, control socket and gateway; drains and closes them at the end.

The four are opened in this order and closed in the reverse order. `up` runs a mesh and shows a table of it; the
background process only runs the mesh.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any

from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.daemon import leftovers, log_file, run_record
from gpumesh.daemon.batch_work import make_worker, open_batches
from gpumesh.daemon.control_socket.server import ControlServer
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.process.garbage_collector import tune_garbage_collector
from gpumesh.daemon.process.open_files import raise_file_limit
from gpumesh.daemon.reload.file_follower import CHECK_INTERVAL_S
from gpumesh.daemon.reload.reloader import Reloader
from gpumesh.daemon.run_record import RunRecord
from gpumesh.daemon.service.manager_link import STOPPING, ManagerLink
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.daemon.state_changes import compare_states
from gpumesh.daemon.up_options import UpOptions
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning, SecretMissing
from gpumesh.state import MeshState
from gpumesh.topology import Topology

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 0.1  # between two states that are compared for the log
RESTORE_INTERVAL_S = 2.0  # between two looks at the lock file and the control socket
IDLE_POLL_S = 0.05  # between two states that are looked at while the mesh drains
NOTIFY_INTERVAL_S = 1.0  # between two states in which events are looked for
HISTORY_INTERVAL_S = 2.0  # as often as nvidia-smi runs


@asynccontextmanager
async def run_mesh(
    topology: Topology,
    paths: MeshPaths,
    *,
    gateway: bool,
    shutdown: Shutdown,
    lock: MeshLock | None = None,
    snapshot: ConfigSnapshot | None = None,
    options: UpOptions | None = None,
    restore_interval_s: float = RESTORE_INTERVAL_S,
    file_check_interval_s: float = CHECK_INTERVAL_S,
) -> AsyncGenerator[LocalSession]:
    """Runs the mesh during the block. At the end drains it, for ``shutdown.drain_s`` seconds at most, and closes it.

    ``gateway``: whether the mesh has a gateway. The caller holds the mesh's lock (``MeshLock.acquire``) and keeps it to
    the end of its process. With ``lock``, the lock file and the control socket are checked every ``restore_interval_s``
    seconds, and restored if they were removed. ``snapshot`` is what mesh.yaml said, before the ``options`` of `up`
    changed it; ``None``: nobody can compare the mesh with its file, and it takes over no changes. The file is checked
    every ``file_check_interval_s`` seconds.
    """
    from gpumesh.gateway.app import Gateway
    from gpumesh.gateway.observe.access_log import AccessLog
    from gpumesh.gateway.observe.recent_log import RecentLog
    from gpumesh.gateway.usage.store import open_store
    from gpumesh.mesh.learned_state import LearnedState
    from gpumesh.mesh.mesh import Mesh
    from gpumesh.mesh.models.placement import ModelPlacement
    from gpumesh.pools.running.manager import PoolManager
    from gpumesh.pools.running.planner import PoolPlanner
    from gpumesh.pools.running.runner import PoolRunner
    from gpumesh.pools.running.turns import StartTurns

    async with AsyncExitStack() as stack:
        stack.enter_context(raise_file_limit())
        stack.callback(_remove_files, paths, lock)
        handler = log_file.start_log(paths.log)
        stack.callback(log_file.stop_log, handler)
        recent_log = RecentLog()
        logging.getLogger("gpumesh").addHandler(recent_log)
        stack.callback(logging.getLogger("gpumesh").removeHandler, recent_log)
        stack.push(_log_failure)
        leftovers.remove_leftovers()
        _log_killed_mesh(paths)
        record = _begin_record(stack, paths)
        manager = ManagerLink.from_environment()
        log.info("the mesh %s starts; nodes: %d", topology.name, len(topology.nodes), extra={"event": "start"})
        stack.callback(log.info, "the mesh %s ended", topology.name, extra={"event": "end"})
        mesh = await stack.enter_async_context(Mesh(topology, learned=LearnedState(paths.learned)))
        placement = ModelPlacement(mesh, clock=time.monotonic)
        planner = PoolPlanner(mesh)
        turns = StartTurns(PoolRunner(mesh, planner).run)
        pools = PoolManager(mesh, turns.run, on_findings=partial(mesh.set_own_findings, subject="pools"))

        def note_change() -> None:
            placement.note_change()
            pools.follow_file()

        reloader = None
        if snapshot is not None:
            reloader = Reloader(
                mesh,
                paths.config,
                snapshot,
                options=options,
                access_log=paths.access_log,
                on_applied=note_change,
            )
            _run_until_closed(stack, reloader.run(interval_s=file_check_interval_s), name="file")
        session = LocalSession(mesh, reloader, pools, planner)
        _run_until_closed(stack, _log_changes(session), name="journal")
        _run_until_closed(stack, _record_history(session), name="history")
        _run_until_closed(stack, _notify(session), name="notify")
        if record is not None:
            _run_until_closed(stack, record.keep(mesh), name="run record")
        if manager is not None:
            _run_until_closed(stack, manager.keep_alive(), name="watchdog")
        _run_until_closed(stack, placement.run(), name="placement")
        _run_until_closed(stack, pools.run(), name="pools")
        control = await stack.enter_async_context(ControlServer(session, paths.socket, on_stop=shutdown.request_within))
        if lock is not None:
            restoring = _restore_when_removed(control, lock, paths, shutdown, restore_interval_s)
            _run_until_closed(stack, restoring, name="keeper")
        batch_store = await open_batches(stack, mesh, paths)
        async with AsyncExitStack() as serving:
            server: Gateway | None = None
            if gateway or batch_store is not None:  # without an address it sends the requests of batches
                access_log = AccessLog(paths.access_log) if topology.gateway.access_log else None
                try:
                    server = Gateway(
                        mesh,
                        access_log=access_log,
                        usage_store=open_store(paths.usage),
                        stop_now=shutdown.forced,
                        recent_log=recent_log,
                        listens=gateway,
                        batch_store=batch_store,
                    )
                except SecretMissing as error:  # of a key, which a mesh without a gateway needs for batches only
                    if gateway:
                        raise
                    log.warning("no batches: %s", error.message, extra={"event": "batch"})
            if server is not None:
                if reloader is not None:
                    reloader.gateway = server
                await serving.enter_async_context(server)
                session.on_answer_end = server.usage.add_prompt
                _run_until_closed(serving, server.usage.run(), name="usage")
                if batch_store is not None:
                    worker = make_worker(batch_store, server.batch_sender, mesh)
                    _run_until_closed(serving, worker.run(), name="batches")
            address_text = "tunnels only"
            if server is not None and gateway:
                address_text = f"serves at {server.listen_description}"
                log.info("the gateway %s", address_text, extra={"event": "gateway"})
            tune_garbage_collector(serving)
            if manager is not None:
                manager.send_ready(address_text)
            yield session
            if manager is not None:
                manager.send(STOPPING)
            if reloader is not None:
                reloader.stop()
            session.refuse_new_prompts()
            log.info("draining, %.0f s at most", shutdown.drain_s, extra={"event": "drain"})
            if server is not None:
                server.drain_s = shutdown.drain_s  # the gateway drains at the end of this block
            drain_began = asyncio.get_running_loop().time()
        # The gateway has drained. The rest of the time is for prompts that came over the control socket.
        spent_s = asyncio.get_running_loop().time() - drain_began
        await wait_drained(session, max(shutdown.drain_s - spent_s, 0.0), shutdown.forced)


def _run_until_closed(stack: AsyncExitStack, work: Coroutine[Any, Any, None], *, name: str) -> None:
    """Runs ``work`` in a task that is cancelled when the stack closes."""
    task = asyncio.create_task(work, name=name)

    async def cancel() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # an error of the task must not stop the closing

    stack.push_async_callback(cancel)


def _remove_files(paths: MeshPaths, lock: MeshLock | None) -> None:
    """Removes the mesh's files, unless another mesh owns them by now. Without ``lock`` this is not checked."""
    if lock is None or lock.still_owns(paths):
        paths.remove_files()


def _log_killed_mesh(paths: MeshPaths) -> None:
    """Accounts in the log for the mesh before this one, if it was killed: when, and which requests it cut. The caller
    holds the lock, so that mesh cannot run any more."""
    killed = run_record.read_record(paths)
    if killed is not None:
        log.error("the mesh before this one (pid %d) %s", killed.pid, killed, extra={"event": "killed"})


def _begin_record(stack: AsyncExitStack, paths: MeshPaths) -> RunRecord | None:
    """Makes the record of this mesh, which is removed when the stack closes. A mesh runs without one where the file
    cannot be made."""
    try:
        return stack.enter_context(RunRecord.begin(paths.run_record))
    except OSError as error:
        log.warning("cannot keep the record of this run: %s", error, extra={"event": "record"})
        return None


def _log_failure(_kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
    """Writes the error that ends the mesh into its log. An exit callback, which runs while the log is still open.

    A cancellation, the usual end, is not logged. The error goes on: an exit callback that returns None stops no error.
    """
    if isinstance(error, GPUMeshError):
        log.error("the mesh ends: %s", error.message, extra={"event": "failed", "node": error.node})
    elif isinstance(error, Exception):
        log.critical("the mesh ends, by a fault of gpumesh's own", exc_info=error, extra={"event": "failed"})


async def wait_drained(session: LocalSession, timeout_s: float, forced: asyncio.Event) -> None:
    """Returns when no request is in flight or queued, or after ``timeout_s``, or when ``forced`` is set."""

    async def wait_until_idle() -> None:
        async with aclosing(session.watch(IDLE_POLL_S)) as states:
            async for state in states:
                if _count_open_requests(state) == 0:
                    return

    tasks = [asyncio.ensure_future(wait_until_idle()), asyncio.ensure_future(forced.wait())]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    remaining = _count_open_requests(session.mesh.snapshot())
    if remaining > 0:
        log.warning("what did not end in time is cut; requests: %d", remaining)


def _count_open_requests(state: MeshState) -> int:
    """Returns the number of requests that are in flight or queued."""
    return state.gateway.in_flight + state.gateway.queued


async def _log_changes(session: LocalSession) -> None:
    """Writes each change of the mesh's state to the log, until it is cancelled."""
    last_state: MeshState | None = None
    async with aclosing(session.watch(LOG_INTERVAL_S)) as states:
        async for state in states:
            for event in compare_states(last_state, state):
                log_file.log_event(event)
            last_state = state


async def _notify(session: LocalSession) -> None:
    """Tells people and programs what happens, by the rules of mesh.yaml, until it is cancelled."""
    from gpumesh.notify.notifier import run_notifier

    mesh = session.mesh
    async with aclosing(session.watch(NOTIFY_INTERVAL_S)) as states:
        await run_notifier(lambda: mesh.topology.notify, states, clock=time.monotonic)


async def _record_history(session: LocalSession) -> None:
    """Adds the mesh's state to the session's history every ``HISTORY_INTERVAL_S`` seconds, until it is cancelled."""
    while True:
        await asyncio.sleep(HISTORY_INTERVAL_S)
        session.recorder.add(await session.status())


async def _restore_when_removed(
    control: ControlServer, lock: MeshLock, paths: MeshPaths, stop: Shutdown, interval_s: float
) -> None:
    """Restores the lock file and the control socket when they were removed. Without these files no command could reach
    or stop this mesh, and the mesh would hold its ports for ever.

    Requests the stop of this mesh if another mesh has taken the lock meanwhile.
    """
    is_failure_logged = False
    while True:
        await asyncio.sleep(interval_s)
        try:
            lock.restore_file(paths)
            await control.restore_socket()
        except MeshAlreadyRunning as error:
            reason = error.message
            log.error("this mesh ends: its lock was taken away, and now %s", reason, extra={"event": "failed"})  # noqa: TRY400
            stop.request()
            return
        except (GPUMeshError, OSError) as error:
            if not is_failure_logged:  # one line for a failure that lasts
                log.warning("no command can reach this mesh: %s", error, extra={"event": "unreachable"})
            is_failure_logged = True
        else:
            is_failure_logged = False
