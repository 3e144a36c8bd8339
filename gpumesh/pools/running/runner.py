"""``PoolRunner``: starts all parts of a pool on its hosts, watches them, and ends them as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from random import Random
from zlib import crc32

from gpumesh.errors import GPUMeshError, PoolDoesNotFit, PoolFailed, TunnelError
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PathKind
from gpumesh.pools.hosts.commands import WorkerAddress, confirm_cache_argv
from gpumesh.pools.hosts.comparison import compare_with_plan
from gpumesh.pools.hosts.ports import FIRST_PORT, LAST_PORT, choose_free_ports
from gpumesh.pools.hosts.worker_traffic import read_received_bytes
from gpumesh.pools.running.parts import HeadPart, WayPart, WorkerPart
from gpumesh.pools.running.planner import PoolPlanner, PreparedPool
from gpumesh.pools.running.pool import PoolRun
from gpumesh.pools.running.pool_node import PoolNode, make_pool_node
from gpumesh.pools.running.speed_watch import watch_speed
from gpumesh.pools.running.task_group import error_group
from gpumesh.pools.running.unloading import unload_models
from gpumesh.tunnels.transport import ReverseForward

FREED_TIMEOUT_S = 20.0  # for the memory that Ollama was asked to free
FREED_PAUSE_S = 1.0
CONFIRM_TIMEOUT_S = 10.0
LOAD_INTERVAL_S = 1.0


class PoolRunner:
    """Runs pools over the tunnels of ``mesh``, by the plans of ``planner``. ``rng`` chooses ports, ``clock`` returns
    monotonic seconds."""

    def __init__(
        self,
        mesh: Mesh,
        planner: PoolPlanner,
        *,
        rng: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mesh = mesh
        self._planner = planner
        self._rng = rng or Random()
        self._clock = clock

    async def run(self, spec: PoolSpec, run: PoolRun, lost: frozenset[str]) -> None:
        """As ``RunPool``."""
        prepared = await self._prepare(spec, lost)
        run.note_planned(prepared.plan)
        await PoolStart(self._mesh, prepared, run, rng=self._rng, clock=self._clock).run()

    async def _prepare(self, spec: PoolSpec, lost: frozenset[str]) -> PreparedPool:
        """A plan that fits into the memory that is free now. If allowed, asks Ollama to free some before."""
        prepared = await self._planner.prepare(spec, lost)
        if not prepared.unload:
            return prepared
        await unload_models(self._mesh, spec.name, prepared.unload)
        deadline = self._clock() + FREED_TIMEOUT_S
        while prepared.unload and self._clock() < deadline:
            await asyncio.sleep(FREED_PAUSE_S)
            prepared = await self._planner.prepare(spec, lost)
        if prepared.unload:
            nodes = ", ".join(prepared.unload)
            raise PoolDoesNotFit(f"the Ollama on {nodes} was asked to unload its models, and their memory is not free")
        return prepared


def choose_server_port(pool: str, used: Collection[int], rng: Random) -> int:
    """The port of a pool's llama-server on the head's host: the same at each start if it is free, because what the mesh
    learns about a server is kept under its address."""
    usual_port = FIRST_PORT + crc32(pool.encode()) % (LAST_PORT - FIRST_PORT)
    return usual_port if usual_port not in used else choose_free_ports(used, 1, rng)[0]


@dataclass(frozen=True, slots=True)
class _Ways:
    """How the head reaches the workers: their ``addresses`` on the head's host, and what leads there."""

    addresses: tuple[WorkerAddress, ...]
    reverse_forwards: tuple[ReverseForward, ...]
    parts: tuple[WayPart, ...]


class PoolStart:
    """One start of a pool: all of its parts, from their start to their end."""

    def __init__(
        self, mesh: Mesh, prepared: PreparedPool, run: PoolRun, *, rng: Random, clock: Callable[[], float]
    ) -> None:
        self._mesh = mesh
        self._clock = clock
        self._prepared = prepared
        self._plan = prepared.plan
        self._run = run
        self._node = PoolNode(mesh, prepared.spec)
        self._head: HeadPart | None = None
        programs, plan = prepared.hosts.programs, prepared.plan
        self._worker_ports = {
            member.node: choose_free_ports(programs[member.node].used_ports, 1, rng)[0] for member in plan.workers
        }
        used = programs[plan.head.node].used_ports | frozenset(self._worker_ports.values())
        self._server_port = choose_server_port(prepared.spec.name, used, rng)
        self._way_ports = choose_free_ports(used | {self._server_port}, len(plan.workers), rng)

    def __repr__(self) -> str:
        return f"<PoolStart {self._prepared.spec.name} head {self._head!r}, {len(self._worker_ports)} workers>"

    async def run(self) -> None:
        """Runs the pool until a part fails, or until cancelled. Raises GPUMeshError."""
        prepared, plan, run = self._prepared, self._plan, self._run
        async with error_group() as group:
            workers = [self._make_worker(index) for index in range(len(plan.workers))]
            for worker in workers:
                group.create_task(worker.run(), name=f"worker {worker.node}")
            ways = self._make_ways({worker.node: await worker.ready_port for worker in workers})
            for way in ways.parts:
                group.create_task(way.run(), name=f"way from {way.node}")
            for way in ways.parts:
                await way.ready_port
            self._head = head = HeadPart(
                self._mesh,
                prepared.hosts.hosts[plan.head.node],
                self,
                prepared=prepared,
                port=self._server_port,
                workers=ways.addresses,
                reverse_forwards=ways.reverse_forwards,
            )
            run.note_loading()
            group.create_task(head.run(), name=f"head {head.node}")
            group.create_task(self._follow_load(head), name="progress of the load")
            local_port = await head.ready_port
            self._require_planned(head, ways.addresses)
            await self._confirm_caches()
            node = make_pool_node(prepared.spec, plan, prepared.hosts.hosts[head.node].node, self._server_port)
            async with self._node.joined(node):
                run.note_ready()
                await self._watch_speed(f"http://127.0.0.1:{local_port}")

    async def _watch_speed(self, url: str) -> None:
        """Reports the pool's speed. Raises PoolFailed when llama-server at ``url`` computes nothing any more."""
        try:
            await watch_speed(
                url,
                acceptance=self._acceptance,
                is_busy=self._node.has_requests,
                report=self._run.progress.set_speed,
                clock=self._clock,
            )
        except PoolFailed as error:
            self.note_failed(error)
            raise

    # -- what the parts report -----------------------------------------------------------------------------------

    def note_broken(self) -> None:
        self._node.leave_at_once()

    def note_failed(self, error: GPUMeshError) -> None:
        self._node.leave_at_once()
        self._run.note_failed(error)

    def note_log_line(self) -> None:
        """The progress of a load is not in the log of each build; ``_follow_load`` sees more."""
        share = None if self._head is None or self._head.log.is_ready else self._head.log.loaded_share
        if share is not None and not self._plan.workers:
            load_bytes = self._plan.shape.weights_bytes
            self._run.progress.set_loaded(int(share * load_bytes), load_bytes)

    async def _follow_load(self, head: HeadPart) -> None:
        """Reports how many bytes of the weights have reached the workers, until llama-server is ready."""
        load_bytes = sum(share.weights_bytes for member in self._plan.workers for share in member.shares)
        most = 0
        while not head.ready_port.done():
            counts = await asyncio.gather(*(self._read_received(member.node) for member in self._plan.workers))
            known = [count for count in counts if count is not None]
            if known and not head.ready_port.done():
                self._run.progress.set_loaded(sum(known), load_bytes)
            if sum(known) > most:
                most = sum(known)
                head.note_life()
            await asyncio.sleep(LOAD_INTERVAL_S)

    async def _read_received(self, node: str) -> int | None:
        try:
            return await read_received_bytes(self._prepared.hosts.hosts[node].route, self._worker_ports[node])
        except TunnelError:
            return None

    # -- the parts -----------------------------------------------------------------------------------------------

    def _make_worker(self, index: int) -> WorkerPart:
        member = self._plan.workers[index]
        return WorkerPart(
            self._mesh,
            self._prepared.hosts.hosts[member.node],
            self,
            plan=member,
            prepared=self._prepared,
            port=self._worker_ports[member.node],
        )

    def _make_ways(self, local_ports: Mapping[str, int]) -> _Ways:
        """``local_ports``: the port of this machine that leads to each worker."""
        hosts = self._prepared.hosts
        head = hosts.hosts[self._plan.head.node]
        addresses, forwards, parts = [], [], []
        for member, head_port in zip(self._plan.workers, self._way_ports, strict=True):
            login = hosts.logins.get(member.node)
            if head.is_here:
                head_port = local_ports[member.node]  # noqa: PLW2901
            elif login is not None and member.path is not None and member.path.kind is PathKind.HEAD_TO_WORKER:
                worker_port = self._worker_ports[member.node]
                parts.append(WayPart(self._mesh, head, self, login=login, head_port=head_port, worker_port=worker_port))
            else:
                forwards.append(ReverseForward(head_port, local_ports[member.node]))
            addresses.append(WorkerAddress(member.node, head_port))
        return _Ways(tuple(addresses), tuple(forwards), tuple(parts))

    def _require_planned(self, head: HeadPart, workers: tuple[WorkerAddress, ...]) -> None:
        """Raises PoolFailed if llama-server has not loaded the model as it was planned."""
        programs = self._prepared.hosts.programs[head.node]
        problems = compare_with_plan(self._plan, head.log, programs=programs, workers=workers)
        if problems:
            raise PoolFailed(f"the pool does not run as planned: {'; '.join(problems)}")
        self._run.progress.set_measured(head.log.bytes_by_node(head.node))

    async def _confirm_caches(self) -> None:
        """Tells the workers' hosts that the weights in their caches are whole."""
        hosts = self._prepared.hosts.hosts
        confirmations = [
            hosts[node].route.exec(confirm_cache_argv(port), timeout_s=CONFIRM_TIMEOUT_S)
            for node, port in self._worker_ports.items()
        ]
        # A host that cannot be told reads these weights anew next time.
        await asyncio.gather(*confirmations, return_exceptions=True)

    def _acceptance(self) -> float | None:
        log = None if self._head is None else self._head.log
        return log.draft_accepted / log.draft_proposed if log is not None and log.draft_proposed else None
