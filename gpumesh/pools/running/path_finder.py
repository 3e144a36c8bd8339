"""``PathFinder``: the better way of the data between a pool's head and each worker, as it was measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpumesh.errors import ExecError, TunnelError
from gpumesh.mesh.mesh import Mesh
from gpumesh.pools.base import PathKind, WorkerPath
from gpumesh.pools.hosts.paths import measure_head_to_worker, measure_through_us
from gpumesh.pools.hosts.worker_login import WorkerLogin, make_worker_login, may_log_in
from gpumesh.pools.running.members import MemberHost
from gpumesh.topology import SshSpec

log = logging.getLogger(__name__)

MAX_AGE_S = 600.0  # a measurement sends some MB over the line


@dataclass(frozen=True, slots=True)
class FoundPath:
    """``login``: how the head logs in to the worker; ``None`` if the data goes another way."""

    path: WorkerPath
    login: WorkerLogin | None = None


class PathFinder:
    """Measures the ways, and keeps the results for ``MAX_AGE_S``. ``clock`` returns monotonic seconds."""

    def __init__(self, mesh: Mesh, *, clock: Callable[[], float]) -> None:
        self._mesh = mesh
        self._clock = clock
        self._known: dict[tuple[SshSpec | None, SshSpec | None], tuple[float, FoundPath]] = {}

    async def find(self, head: MemberHost, workers: Iterable[MemberHost]) -> dict[str, FoundPath]:
        """The way to each worker, by its node. One after the other, because they share the head's line."""
        return {worker.node.name: await self._find(head, worker) for worker in workers}

    async def _find(self, head: MemberHost, worker: MemberHost) -> FoundPath:
        if head.is_here and worker.is_here:
            return FoundPath(WorkerPath(PathKind.LOCAL, 0.0))
        key, now = (head.node.ssh, worker.node.ssh), self._clock()
        if key in self._known and now - self._known[key][0] < MAX_AGE_S:
            return self._known[key][1]
        try:
            found = await self._measure(head, worker)
        except (ExecError, TunnelError) as error:
            log.warning("the way from %s to %s is not measured: %s", head.node.name, worker.node.name, error)
            return FoundPath(WorkerPath(PathKind.THROUGH_US, self._sum_round_trips_ms(head, worker)))
        self._known[key] = (now, found)
        return found

    async def _measure(self, head: MemberHost, worker: MemberHost) -> FoundPath:
        through_us = FoundPath(await measure_through_us(head.route, worker.route))
        login = None
        if not head.is_here:
            login = make_worker_login(worker.node, mesh=self._mesh.topology.identity)
        if login is None or await may_log_in(head.route, login) is not None:
            return through_us
        direct = FoundPath(await measure_head_to_worker(head.route, login), login)
        return direct if _round_trip(direct) <= _round_trip(through_us) else through_us

    def _sum_round_trips_ms(self, head: MemberHost, worker: MemberHost) -> float | None:
        """The round trips of both tunnels together; ``None`` if one of them is not known."""
        names = [host.node.name for host in (head, worker) if not host.is_here]
        parts = [self._mesh.tunnel(name).state.rtt_ms for name in names]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def _round_trip(found: FoundPath) -> float:
    """It decides about the tokens per second."""
    return float("inf") if found.path.rtt_ms is None else found.path.rtt_ms
