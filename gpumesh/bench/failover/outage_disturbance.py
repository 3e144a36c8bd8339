"""``OutageDisturbance``: takes a node out of service in the middle of a stage, and notes when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

from gpumesh.bench.failover.outage_plan import OutagePlan, choose_node, plan_outage
from gpumesh.bench.figures.outages.failover import OUTAGE_WORDS, OutageTimes
from gpumesh.errors import GPUMeshError
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import MeshState
from gpumesh.text.quoting import paste_command


class OutageTarget(Protocol):
    """The measured mesh, as far as an outage needs it."""

    embedded: bool

    async def status(self) -> MeshState: ...

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]: ...


class OutageDisturbance:
    """Takes a node of ``nodes`` out of service as ``plan`` says. The mesh puts it back when this process ends, too.

    ``times`` has the moments of the outage, on ``clock``; ``None`` before it begins.
    """

    def __init__(
        self,
        target: OutageTarget,
        plan: OutagePlan,
        nodes: Sequence[str],
        state: MeshState,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``state``: the mesh's state now. Raises UsageError if there can be no such outage."""
        self._target = target
        self._plan = plan
        self._nodes = nodes
        self._clock = clock
        self._outage = plan_outage(plan, state, nodes, embedded=target.embedded)
        self._hold = AsyncExitStack()  # keeps the node out of service while it is open
        self.times: OutageTimes | None = None

    @property
    def notes(self) -> list[str]:
        """What a person should know who has not said how the node is taken out."""
        if self._plan.kind is None and self._outage.kind is OutageKind.DRAIN:
            return ["the nodes are reached without SSH, so a node was drained: there is no tunnel that could be cut"]
        return []

    async def begin(self) -> str:
        """Takes the node out of service. Returns a description: "oslo: tunnel cut"."""
        node = choose_node(self._plan, self._outage.kind, await self._target.status(), self._nodes)
        self.times = OutageTimes(node, self._outage.kind, asked_s=self._clock())
        await self._hold.enter_async_context(self._target.hold(node, self._outage))
        self.times.out_s = self._clock()
        return f"{node}: {OUTAGE_WORDS[self._outage.kind]}"

    async def end(self) -> None:
        """Puts the node back into service, if it was taken out. Raises GPUMeshError if that fails."""
        if self.times is None:
            return
        if self.times.released_s is None:
            self.times.released_s = self._clock()
        try:
            await self._hold.aclose()
        except GPUMeshError as error:
            if self._outage.start_command is None:
                raise
            command = paste_command(
                "gpumesh exec {node} -- sh -c {command}", node=self.times.node, command=self._outage.start_command
            )
            message = f"the server of {self.times.node} may still be stopped: {error.message}"
            raise GPUMeshError(message, hint=f"start it: {command}", node=self.times.node) from error
