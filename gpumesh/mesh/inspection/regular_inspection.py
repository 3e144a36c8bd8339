"""Inspects the nodes of a running mesh: soon after a node came up, then every ten minutes, a few nodes at a time.

An inspection costs some ten small requests for each route to a server, one `df` on the host, and one connection attempt
to the host's own address. Measured with a simulated server that lists one model, that is 6 KB; the HTTP probes of ten
minutes take 455 KB.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpumesh.errors import ExecError, SecretMissing
from gpumesh.mesh.inspection.node_inspection import (
    InspectionReport,
    inspect_node,
    merge_report,
)
from gpumesh.probes.commands.host_commands import CommandsUnfinished, CommandsUnproven
from gpumesh.state import NodeState

if TYPE_CHECKING:
    import httpx

    from gpumesh.mesh.nodes.snapshot import NodeRole
    from gpumesh.probes.commands.host_commands import HostCommands
    from gpumesh.topology import NodeSpec
    from gpumesh.tunnels.base import Tunnel

log = logging.getLogger(__name__)

INTERVAL_S = 600.0
SETTLE_S = 30.0  # from when a node came up to its inspection; times the factor of `_stagger`
CHECK_INTERVAL_S = 5.0  # between two checks which nodes are due
MAX_CONCURRENT = 4  # inspections
TIMEOUT_S = 5.0  # of one inspection

Route = tuple[int, str]
"""How a node is reached: the number of its tunnel's connection, and the URL of the server in use. A report is valid for
one route only, because another route may lead to another host."""


class InspectedNode(Protocol):
    """The part of a node that an inspection uses."""

    name: str
    spec: NodeSpec
    role: NodeRole

    @property
    def tunnel(self) -> Tunnel | None: ...

    @property
    def connection_count(self) -> int: ...

    @property
    def host_commands(self) -> HostCommands | None: ...

    @property
    def reachable(self) -> bool: ...

    @property
    def base_url(self) -> str: ...

    def api_key(self) -> str | None: ...

    def state(self, queued: int) -> NodeState: ...


@dataclass(slots=True)
class _NodeRecord:
    """A node, its next inspection and its last report.

    ``route`` is how the node is reached now; ``None`` while it must not be inspected. ``due_at`` is the time of the
    next inspection, in seconds of the clock. ``report`` is the last report, which was made over ``reported_route``.
    ``task`` is the inspection that runs now.
    """

    node: InspectedNode
    route: Route | None = None
    due_at: float = 0.0
    report: InspectionReport | None = None
    reported_route: Route | None = None
    task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        if self.task is not None:
            phase = "running"
        elif self.route is not None:
            phase = f"due at {self.due_at:.0f}"
        else:
            phase = "not up"
        return f"<_NodeRecord {self.node.name} {phase}>"

    def update(self, now: float) -> bool:
        """Updates ``route``, and ``due_at`` if the route is new. Returns whether an inspection must start now."""
        route = _route_of(self.node)
        if route != self.route:
            # A node with the route of its last report was only drained for a while: it stays due at the same time.
            if route is not None and route != self.reported_route:
                self.due_at = now + SETTLE_S * _stagger(self.node.name)
            self.route = route
        return route is not None and self.task is None and now >= self.due_at

    def current_report(self) -> InspectionReport | None:
        """The last report, if the node is still reached by the same route; else ``None``. The report of a draining node
        stays valid: only new inspections wait for the end of the draining."""
        is_current = self.reported_route == _route_of(self.node, despite_draining=True)
        return self.report if is_current else None


class RegularInspection:
    """Inspects ``nodes`` while ``run`` runs, and keeps the last report of each. ``clock`` returns monotonic seconds;
    ``on_report`` is called after each inspection."""

    def __init__(
        self,
        nodes: Iterable[InspectedNode],
        client: httpx.AsyncClient,
        *,
        clock: Callable[[], float],
        on_report: Callable[[], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._records = {node.name: _NodeRecord(node) for node in nodes}
        self._client = client
        self._clock = clock
        self._on_report = on_report
        self._sleep = sleep

    def __repr__(self) -> str:
        reports = sum(record.report is not None for record in self._records.values())
        return f"<RegularInspection {len(self._records)} nodes, {reports} reports, {self._count_running()} running>"

    async def run(self) -> None:
        """Inspects nodes when they are due. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for record in self._list_due():
                    record.task = group.create_task(self._inspect(record), name=f"inspection of {record.node.name}")
                await self._sleep(CHECK_INTERVAL_S)

    def merge(self, state: NodeState) -> NodeState:
        """The state with the last report of its node, if the node is still reached by the same route."""
        record = self._records.get(state.name)
        report = None if record is None else record.current_report()
        return state if report is None else merge_report(state, report)

    def add(self, node: InspectedNode) -> None:
        """Inspects this node too."""
        self._records[node.name] = _NodeRecord(node)

    def remove(self, node: InspectedNode) -> None:
        """Inspects this node no more, and ends the inspection that runs there now."""
        record = self._records.get(node.name)
        if record is not None and record.node is node:
            del self._records[node.name]
            if record.task is not None:
                record.task.cancel()

    def _list_due(self) -> list[_NodeRecord]:
        """The nodes whose inspections must start now, the longest overdue first. There are only so many that at most
        ``MAX_CONCURRENT`` inspections run."""
        now = self._clock()
        due = [record for record in self._records.values() if record.update(now)]
        due.sort(key=lambda record: record.due_at)
        free_places = max(MAX_CONCURRENT - self._count_running(), 0)
        return due[:free_places]

    def _count_running(self) -> int:
        return sum(record.task is not None for record in self._records.values())

    async def _inspect(self, record: _NodeRecord) -> None:
        """Inspects the node, and stores the report if the node is still reached by the same route."""
        node, route = record.node, record.route
        try:
            report = await self._inspect_node(node)
        except Exception:
            # A bug of ours: the code that reads answers did not expect this answer. The bug must not end the mesh, so
            # only this inspection is lost.
            log.exception("a node could not be inspected", extra={"event": "probe-failed", "node": node.name})
            report = None
        finally:
            record.task = None
            if record.route == route:  # for a new route, ``update`` has set the time of the first inspection
                record.due_at = self._clock() + INTERVAL_S
        if report is not None and route == _route_of(node, despite_draining=True):
            record.report, record.reported_route = report, route
            self._on_report()

    async def _inspect_node(self, node: InspectedNode) -> InspectionReport | None:
        """The report of one inspection; ``None`` if the key of the node's server is missing."""
        commands = node.host_commands
        assert commands is not None, "a node without a tunnel was due"

        async def run_command(argv: Sequence[str]) -> bytes:
            """Runs the command on the host, and returns its output. Raises ExecError."""
            if commands.has_no_shell:
                raise ExecError("the host runs no shell")
            try:
                # Killed after its time-out: until then, the probes of the GPUs wait.
                (answer,) = await commands.run((tuple(argv),), timeout_s=TIMEOUT_S, kill_after_s=TIMEOUT_S)
            except (CommandsUnfinished, CommandsUnproven) as error:
                raise ExecError(str(error)) from error
            return answer.output

        try:
            api_key = node.api_key()
        except SecretMissing:
            return None  # the missing secret is a finding of its own
        return await inspect_node(
            self._client, node.spec, node.state(queued=0), api_key=api_key, run_command=run_command, timeout_s=TIMEOUT_S
        )


def _route_of(node: InspectedNode, *, despite_draining: bool = False) -> Route | None:
    """How the node is reached now; ``None`` while it is down. A draining node counts as down, unless
    ``despite_draining``."""
    counts_as_down = not node.reachable or (node.role.draining and not despite_draining)
    if counts_as_down:
        return None
    return (node.connection_count, node.base_url)


def _stagger(name: str) -> float:
    """A factor from 0.5 to 1.5, from the node's name, so that nodes that come up together are inspected at different
    times."""
    return 0.5 + zlib.crc32(name.encode()) / 2**32
