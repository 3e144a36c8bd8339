"""Who goes where, and who waits: the balancer's pure decisions, applied to the running nodes.

``acquire`` returns at once while a place is free; otherwise the request waits in the mesh's own queue (not unseen in
Ollama's) until ``pump`` finds it one. A node that is only just away (reconnecting) is waited for, ``grace_s`` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.queue import WaitQueue
from gpumesh.balancer.select import gpu_group, has_model, no_node_error, select_candidates
from gpumesh.errors import DeadlineExceeded, QueueFull
from gpumesh.mesh.nodes.node import Lease, Node
from gpumesh.state import WaitingState
from gpumesh.topology import PolicyKind

GRACE_S = 6.0
LOOK_AGAIN_S = 0.2


@dataclass(slots=True)
class _Waiter:
    demand: Demand
    exclude: frozenset[str]
    granted: asyncio.Future[Lease]
    hopeless_since: float | None = None


class Dispatcher:
    def __init__(
        self,
        nodes: Mapping[str, Node],
        policy: PolicyKind,
        *,
        clock: Callable[[], float],
        rng: Random,
        max_queue: int,
        grace_s: float = GRACE_S,
    ) -> None:
        self._nodes = nodes
        self._policy = POLICIES[policy]
        self._clock = clock
        self._rng = rng
        self._grace_s = grace_s
        self._turn = 0
        self._queue: WaitQueue[_Waiter] = WaitQueue(max_queue)
        self._recent_wait_s = 1.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        return len(self._queue)

    def waiting(self, limit: int) -> tuple[WaitingState, ...]:
        """The first ``limit`` of the queue, next first."""
        now = self._clock()
        return tuple(
            WaitingState(
                position,
                waiting.priority.value,
                waiting.payload.demand.model,
                waiting.payload.demand.node,
                round(now - waiting.queued_at, 3),
                waiting.payload.demand.id,
            )
            for position, waiting in enumerate(islice(self._queue, limit))
        )

    def queued_for(self, node: str) -> int:
        """Those that wait for this node and no other."""
        return sum(waiting.payload.demand.node == node for waiting in self._queue)

    def slot_is_wanted(self, node: str) -> bool:
        """Whether a request waits that a slot on this node, or on one that shares its GPU, would be given to."""
        candidates = self._candidates()
        groups = {gpu_group(candidate) for candidate in candidates if candidate.name == node}
        asked: set[tuple[Demand, frozenset[str]]] = set()
        for waiting in self._queue:
            waiter = waiting.payload
            key = (_key(waiter.demand), waiter.exclude)
            if waiter.granted.done() or key in asked:
                continue
            asked.add(key)
            if any(
                gpu_group(one) in groups for one in select_candidates(candidates, key[0], exclude=waiter.exclude).busy
            ):
                return True
        return False

    def could_serve(self, demand: Demand, *, exclude: frozenset[str]) -> bool:
        """Whether any other node takes such work, now or when it has a free place."""
        found = select_candidates(self._candidates(), demand, exclude=exclude)
        return bool(found.free or found.busy)

    def worth_waiting(self, demand: Demand) -> bool:
        """Whether a node that could take such work a moment ago may be able to in a moment."""
        seen = [candidate for candidate in self._candidates() if candidate.models is not None]
        return self._coming(seen, demand, frozenset())

    async def acquire(
        self,
        demand: Demand,
        *,
        exclude: frozenset[str] = frozenset(),
        timeout_s: float,
        since: float | None = None,
    ) -> Lease:
        """A place on the best node for this demand.

        ``since``: it was accepted then and its node has failed it; it waits as if it had waited from then on, and is
        not turned away because many wait.

        Raises NoNodeError or ModelMissing when nobody could serve it, QueueFull past the bound, and DeadlineExceeded.
        """
        # Whoever waits already goes first, unless no place that is free now is of use to them.
        if len(self._queue):
            self.grant_waiting()
        candidates = self._candidates()
        lease = self._grant(demand, exclude, candidates)
        if lease is not None:
            return lease
        waiter = _Waiter(demand, exclude, asyncio.get_running_loop().create_future())
        if not self._may_wait(waiter, candidates):
            raise no_node_error(candidates, demand, exclude=exclude)
        if self._queue.is_full and since is None:
            raise QueueFull(f"{len(self._queue)} requests wait already", retry_after_s=max(self._recent_wait_s, 1.0))
        return await self._wait(waiter, timeout_s, since)

    def acquire_despite_breaker(self, demand: Demand, *, exclude: frozenset[str]) -> Lease | None:
        """For a request that nobody else can take any more: a free place on a node that works, but failed so often
        lately that it is given no new requests. Better than the error that the client would get."""
        now = self._clock()
        candidates = [node.candidate(now, despite_breaker=True) for node in self._nodes.values()]
        return self._grant(demand, exclude, candidates)

    async def _wait(self, waiter: _Waiter, timeout_s: float, since: float | None) -> Lease:
        began = self._clock()
        rank = began if since is None else since
        waiting = self._queue.add(waiter, waiter.demand.priority, rank, bounded=since is None)
        try:
            async with asyncio.timeout(timeout_s):
                lease = await waiter.granted
        except TimeoutError:
            self._give_back(waiter)
            raise DeadlineExceeded(f"no place became free within {timeout_s:.0f} s") from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            self._queue.discard(waiting)
        self._recent_wait_s += 0.2 * (self._clock() - began - self._recent_wait_s)
        return lease

    def _give_back(self, waiter: _Waiter) -> None:
        """The waiter left in the very moment in which it was granted a place."""
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result().discard()

    def grant_waiting(self) -> None:
        """Grants what can be granted now, in the order of the queue. Called when a place is freed or a node changes."""
        if not len(self._queue):
            return
        candidates = self._candidates()
        full: set[Demand] = set()
        for waiting in self._queue:
            waiter = waiting.payload
            if waiter.granted.done():
                continue
            key = _key(waiter.demand)
            if key in full and not waiter.exclude:
                continue
            lease = self._grant(waiter.demand, waiter.exclude, candidates)
            if lease is not None:
                waiter.granted.set_result(lease)
                candidates = self._candidates()
            elif self._may_wait(waiter, candidates):
                full.add(key)
            else:
                waiter.granted.set_exception(no_node_error(candidates, waiter.demand, exclude=waiter.exclude))

    def _grant(self, demand: Demand, exclude: frozenset[str], candidates: list[Candidate]) -> Lease | None:
        now = select_candidates(candidates, demand, exclude=exclude).free
        if not now:
            return None
        if len(now) == 1:
            name = now[0].name
        else:
            self._turn += 1
            name = self._policy(now, demand, self._turn, self._rng)[0]
        return self._nodes[name].lease(demand)

    def _may_wait(self, waiter: _Waiter, candidates: list[Candidate]) -> bool:
        demand = waiter.demand
        if select_candidates(candidates, demand, exclude=waiter.exclude).busy:
            waiter.hopeless_since = None
            return True
        if not self._coming(candidates, demand, waiter.exclude):
            return False
        now = self._clock()
        if waiter.hopeless_since is None:
            waiter.hopeless_since = now
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look_again)
        return now - waiter.hopeless_since < self._grace_s

    def _coming(self, candidates: list[Candidate], demand: Demand, exclude: frozenset[str]) -> bool:
        return any(
            self._nodes[candidate.name].may_recover
            and candidate.name not in exclude
            and candidate.kind in demand.kinds
            and demand.node in (None, candidate.name)
            and has_model(candidate, demand.model)
            for candidate in candidates
        )

    def _look_again(self) -> None:
        """What no event announces: a breaker's pause that ends, a grace that runs out."""
        self._timer = None
        self.grant_waiting()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _candidates(self) -> list[Candidate]:
        now = self._clock()
        return [node.candidate(now) for node in self._nodes.values()]


def _key(demand: Demand) -> Demand:
    """Equal for demands that the same nodes could take."""
    return Demand(model=demand.model, kinds=demand.kinds, node=demand.node)
