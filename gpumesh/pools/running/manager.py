"""``PoolManager``: the pools of a running mesh: starts and stops them, and follows mesh.yaml."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from random import Random

from gpumesh.errors import PoolError, pool_error_from_code, unknown_pool
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPhase, PoolState
from gpumesh.pools.running.lifecycle import RestartTiming
from gpumesh.pools.running.pool import RunPool, SupervisedPool
from gpumesh.state import Finding, Severity, TunnelPhase
from gpumesh.text.model_names import full_name
from gpumesh.text.quoting import paste_command
from gpumesh.topology import SshSpec

PROGRESS_INTERVAL_S = 0.2  # between two states of a pool that is being started
TUNNELS_INTERVAL_S = 0.5  # between two looks at which tunnels are up


class PoolManager:
    """Runs the pools of the mesh's file. ``run`` must run meanwhile; when it is cancelled, all pools end with it.

    ``run_pool`` starts one pool. ``on_findings`` gets the findings about pools when they have changed."""

    def __init__(
        self,
        mesh: Mesh,
        run_pool: RunPool,
        *,
        on_findings: Callable[[tuple[Finding, ...]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
        timing: RestartTiming | None = None,
    ) -> None:
        self._mesh = mesh
        self._run_pool = run_pool
        self._on_findings = on_findings
        self._clock = clock
        self._rng = rng or Random()
        self._timing = timing
        self._changes = ChangeNotifier()
        self._pools: dict[str, SupervisedPool] = {}
        self._routes: dict[str, tuple[SshSpec | None, ...]] = {}  # to the members of each pool, by mesh.yaml
        self._tasks: dict[SupervisedPool, asyncio.Task[None]] = {}
        self._leaving: set[SupervisedPool] = set()  # removed from mesh.yaml, and not ended yet
        self._group: asyncio.TaskGroup | None = None

    def __repr__(self) -> str:
        ready = sum(pool.life.phase is PoolPhase.READY for pool in self._pools.values())
        return f"<PoolManager {len(self._pools)} pools, {ready} ready>"

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the pools until cancelled. Returns when all their parts have ended."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self.follow_file()
            group.create_task(self._follow_tunnels(), name="tunnels of pools")
            await self._report_findings()

    def follow_file(self) -> None:
        """Takes over the pools of the mesh's file. A pool that the file does not have any more ends. One that it has
        changed runs on as it is until a person starts it anew, or it fails. One that is new starts if it shall start
        with the mesh."""
        if self._group is None:
            return
        specs = {spec.name: spec for spec in self._mesh.file_topology.pools}
        for name in self._pools.keys() - specs.keys():
            self._remove(self._pools.pop(name))
        for name, spec in specs.items():
            pool = self._pools.get(name)
            if pool is None:
                self._pools[name] = pool = self._add(spec, self._group)
                if spec.autostart:
                    pool.request_start()
            else:
                pool.take_over(spec)
                if self._routes_of(spec) != self._routes.get(name):
                    pool.note_moved_members()
            self._routes[name] = self._routes_of(spec)
        self._pools = {name: self._pools[name] for name in specs}
        self._changes.notify()

    def _routes_of(self, spec: PoolSpec) -> tuple[SshSpec | None, ...]:
        """How the members are reached."""
        nodes = {node.name: node for node in self._mesh.file_topology.nodes}
        return tuple(nodes[member.node].ssh for member in spec.members if member.node in nodes)

    def _add(self, spec: PoolSpec, group: asyncio.TaskGroup) -> SupervisedPool:
        pool = SupervisedPool(
            spec,
            self._run_pool,
            clock=self._clock,
            rng=self._rng,
            on_change=self._changes.notify,
            timing=self._timing,
        )
        self._tasks[pool] = group.create_task(pool.run(), name=f"pool {spec.name}")
        return pool

    def _remove(self, pool: SupervisedPool) -> None:
        """Ends the pool; its task ends after that."""
        assert self._group is not None
        self._leaving.add(pool)
        self._group.create_task(self._finish(pool), name=f"end of pool {pool.spec.name}")

    async def _finish(self, pool: SupervisedPool) -> None:
        pool.request_stop()
        await self._wait_stopped(pool)
        self._tasks.pop(pool).cancel()
        self._leaving.discard(pool)

    # -- what a Session asks for ---------------------------------------------------------------------------------

    def states(self) -> tuple[PoolState, ...]:
        return tuple(pool.state() for pool in self._pools.values())

    async def start(self, name: str) -> AsyncGenerator[PoolState]:
        """As ``Session.start_pool``."""
        pool = self._find(name)
        was_wanted = pool.life.wanted
        pool.request_start()
        is_ready = False
        try:
            async with closing_iterator(self._changes.watch()) as changes:
                last: PoolState | None = None
                async for _ in changes:
                    state = pool.state()
                    is_ready = state.phase is PoolPhase.READY and pool.changed_spec is None
                    if state != last:
                        yield state
                        last = state
                    if is_ready:
                        return
                    _require_hope(pool)
                    await asyncio.sleep(PROGRESS_INTERVAL_S)
        except (GeneratorExit, asyncio.CancelledError):
            if not (was_wanted or is_ready):
                pool.request_stop()
            raise

    async def stop(self, name: str) -> None:
        """As ``Session.stop_pool``."""
        pool = self._find(name)
        pool.request_stop()
        await self._wait_stopped(pool)

    def _find(self, name: str) -> SupervisedPool:
        if name not in self._pools:
            raise unknown_pool(name, self._pools)
        return self._pools[name]

    async def _wait_stopped(self, pool: SupervisedPool) -> None:
        async with closing_iterator(self._changes.watch()) as changes:
            async for _ in changes:
                if not pool.life.has_parts:
                    return

    # -- following the mesh --------------------------------------------------------------------------------------

    async def _follow_tunnels(self) -> None:
        """Tells the pools that wait when the tunnel of a member has come up, until cancelled."""
        async with closing_iterator(self._changes.watch()) as changes:
            async for _ in changes:
                if self._waiting_pools():
                    await self._follow_tunnels_for_waiting()

    async def _follow_tunnels_for_waiting(self) -> None:
        """Does that until no pool waits any more."""
        up = self._nodes_up()
        async with closing_iterator(self._mesh.watch_changes()) as changes:
            async for _ in changes:
                waiting = self._waiting_pools()
                if not waiting:
                    return
                up_now = self._nodes_up()
                for pool in waiting:
                    # A tunnel may have come up before the pool began to wait for it.
                    awaited = frozenset() if pool.life.cause is None else pool.life.cause.unreachable
                    for name in up_now - (up - awaited):
                        pool.note_tunnel_up(name)
                up = up_now
                await asyncio.sleep(TUNNELS_INTERVAL_S)

    def _waiting_pools(self) -> list[SupervisedPool]:
        return [pool for pool in self._pools.values() if pool.life.phase in (PoolPhase.BACKOFF, PoolPhase.FAILED)]

    def _nodes_up(self) -> set[str]:
        """The names of the nodes whose tunnels are up."""
        tunnels = [(node.name, node.tunnel) for node in self._mesh.fleet if not node.spec.pool_members]
        return {name for name, tunnel in tunnels if tunnel and tunnel.state.state is TunnelPhase.UP}

    async def _report_findings(self) -> None:
        """Reports a finding for each pool that is wanted and has failed, and why the models of pools are not served,
        until cancelled."""
        reported: tuple[Finding, ...] = ()
        async with closing_iterator(self._changes.watch()) as changes:
            async for _ in changes:
                findings = tuple(finding for pool in self._pools.values() for finding in _findings_of(pool))
                self._mesh.fleet.pools_away = {
                    full_name(pool.spec.served_name): _describe_away(pool)
                    for pool in self._pools.values()
                    if pool.life.phase is not PoolPhase.READY
                }
                if findings != reported:
                    self._on_findings(findings)
                    reported = findings
                await asyncio.sleep(PROGRESS_INTERVAL_S)


_AWAY = {
    PoolPhase.STOPPED: "does not run",
    PoolPhase.PLANNING: "is being started",
    PoolPhase.STARTING: "is being started",
    PoolPhase.LOADING: "loads it now",
    PoolPhase.BACKOFF: "has failed, and is started again",
    PoolPhase.FAILED: "has failed",
    PoolPhase.STOPPING: "is being stopped",
}


def _describe_away(pool: SupervisedPool) -> str:
    """Why clients do not get the pool's model now, unless another node has it."""
    cause = pool.life.cause
    reason = "" if cause is None else f": {cause.message}"
    spec = pool.spec
    return f"the pool {spec.name}, which has the model {spec.served_name!r}, {_AWAY[pool.life.phase]}{reason}"


def _require_hope(pool: SupervisedPool) -> None:
    """Raises PoolError if the pool does not get ready without a person."""
    life, name = pool.life, pool.spec.name
    if life.phase is PoolPhase.FAILED and life.cause is not None:
        cause = life.cause
        raise pool_error_from_code(cause.code, f"pool {name}: {cause.message}", hint=cause.hint, node=cause.lost_node)
    if not life.wanted:
        raise PoolError(f"pool {name} was stopped while it was being started")


def _findings_of(pool: SupervisedPool) -> list[Finding]:
    cause = pool.life.cause
    if not pool.life.wanted or cause is None:
        return []
    message = f"the pool {pool.spec.name} does not serve: {cause.message}"
    hint = cause.hint or paste_command("gpumesh pool status {POOL}", POOL=pool.spec.name) + " shows its members"
    return [Finding("pool-down", Severity.WARNING, None, message, hint)]
