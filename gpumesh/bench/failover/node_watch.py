"""``NodeWatch``: notes each change of the nodes' health that the mesh tells, with its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from gpumesh.bench.figures.outages.node_events import HealthChange
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.state import Health, MeshState

INTERVAL_S = 0.02  # between two states: a change is noted at most this time late


class NodeWatch:
    """The changes of health until now, in the order of time. The first of each node is its health at the start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.changes: list[HealthChange] = []
        self._clock = clock
        self._healths: dict[str, Health] = {}  # the last known, by the name of the node
        self._changed = asyncio.Event()

    def add(self, state: MeshState) -> None:
        """Notes the changes since the last state."""
        now = self._clock()
        for node in state.nodes:
            if self._healths.get(node.name) is not node.health:
                self._healths[node.name] = node.health
                self.changes.append(HealthChange(now, node.name, node.health, node.reason))
        self._changed.set()

    async def wait_serving(self, node: str, timeout_s: float) -> bool:
        """Waits until the node serves. Returns whether it does; false after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._healths.get(node, Health.UNKNOWN).is_serving:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def watch_nodes(
    watch: Callable[[float], AsyncIterator[MeshState]], clock: Callable[[], float] = time.perf_counter
) -> AsyncGenerator[NodeWatch]:
    """Watches the mesh's nodes during the block. ``watch`` yields the mesh's states (``Session.watch``)."""
    seen = NodeWatch(clock)

    async def follow() -> None:
        async with closing_iterator(watch(INTERVAL_S)) as states:
            async for state in states:
                seen.add(state)

    # Not a TaskGroup: an exception of the block should reach the caller unchanged, not in a group.
    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # a mesh that has ended fails the block's requests, too
