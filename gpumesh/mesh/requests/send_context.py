"""``SendContext``: the objects that all requests of a mesh share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from random import Random

from gpumesh.backends.continuation.planner import ContinuationStrategies
from gpumesh.balancer.base import Demand
from gpumesh.errors import GPUMeshError
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.requests.route_gaps import RouteGaps
from gpumesh.mesh.requests.silence_watch import PauseTracker
from gpumesh.mesh.requests.upstream import Upstream


@dataclass(frozen=True, slots=True)
class SendContext:
    """The objects that all requests of a mesh share.

    ``clock`` returns seconds. ``explain_no_node`` makes the error that explains why no node can serve a request; it
    also takes the names of nodes that have just answered that they do not have the model."""

    upstream: Upstream
    dispatcher: Dispatcher
    clock: Callable[[], float]
    rng: Random
    explain_no_node: Callable[[Demand, Collection[str]], GPUMeshError]
    strategies: ContinuationStrategies = field(default_factory=dict)
    pauses: PauseTracker = field(default_factory=PauseTracker)
    route_gaps: RouteGaps = field(default_factory=lambda: RouteGaps(time.monotonic))

    def forget_nodes(self, nodes: Collection[str]) -> None:
        """Forgets what was learned of the servers of these nodes, because other servers may have their names now."""
        for node, model in [key for key in self.strategies if key[0] in nodes]:
            del self.strategies[node, model]
        self.pauses.forget(nodes)
        self.route_gaps.forget(nodes)
