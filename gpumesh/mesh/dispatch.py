"""The dispatcher: applies the balancer's pure decisions to the running nodes, and holds the queue.

``acquire`` returns at once while a slot is free. Otherwise the request waits in the mesh's own queue, not unseen in
Ollama's, until ``grant_waiting`` gives it a slot. A node that is away only for a moment (reconnecting) is waited for,
``grace_s`` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.queue import WaitQueue
from gpumesh.balancer.select import gpu_group, has_model, no_node_error, select_candidates
from gpumesh.errors import DeadlineExceeded, QueueFull
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.state import WaitingState
from gpumesh.topology import PolicyKind

GRACE_S = 6.0
RECHECK_S = 0.2
WAIT_SMOOTHING = 0.2  # weight of the newest wait in the mean that Retry-After tells


@dataclass(slots=True)
class _Waiter:
    """A request in the queue. ``hopeless_since``: from then on only nodes that are away could serve it."""

    demand: Demand
    exclude: frozenset[str]
    granted: asyncio.Future[Lease]
    hopeless_since: float | None = None


class Dispatcher:
    """Chooses nodes by ``policy``; ``max_queue`` requests at most wait."""

    def __init__(
        self,
        fleet: Fleet,
        policy: PolicyKind,
        *,
        clock: Callable[[], float],
        rng: Random,
        max_queue: int,
        grace_s: float = GRACE_S,
    ) -> None:
        self._fleet = fleet
        self._policy_kind = policy
        self._policy = POLICIES[policy]
        self._clock = clock
        self._rng = rng
        self._grace_s = grace_s
        self._turn = 0
        self._queue: WaitQueue[_Waiter] = WaitQueue(max_queue)
        self._recent_wait_s = 1.0
        self._recheck_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Dispatcher {self._policy_kind.value} {len(self._queue)} queued>"

    # -- what is seen of the queue -------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        return len(self._queue)

    def waiting(self, limit: int) -> tuple[WaitingState, ...]:
        """The first ``limit`` requests of the queue, in the order of service."""
        now = self._clock()
        return tuple(
            WaitingState(
                position,
                entry.priority.value,
                entry.payload.demand.model,
                entry.payload.demand.node,
                round(now - entry.queued_at, 3),
                entry.payload.demand.id,
            )
            for position, entry in enumerate(islice(self._queue, limit))
        )

    def queued_for(self, node: str) -> int:
        """How many requests wait for this node and no other."""
        return sum(entry.payload.demand.node == node for entry in self._queue) if len(self._queue) else 0

    def slot_is_wanted(self, node: str) -> bool:
        """Whether a request waits that would be given a slot of this node, or of a node that shares its GPU."""
        candidates = self._fleet.candidates()
        groups = {gpu_group(candidate) for candidate in candidates if candidate.name == node}
        tried: set[tuple[Demand, frozenset[str]]] = set()
        for entry in self._queue:
            waiter = entry.payload
            key = (_selection_key(waiter.demand), waiter.exclude)
            if waiter.granted.done() or key in tried:
                continue
            tried.add(key)
            busy = select_candidates(candidates, key[0], exclude=waiter.exclude).busy
            if any(gpu_group(candidate) in groups for candidate in busy):
                return True
        return False

    # -- could a node serve --------------------------------------------------------------------------------------

    def could_serve(self, demand: Demand, *, exclude: frozenset[str]) -> bool:
        """Whether any other node takes this demand, now or when it has a free slot."""
        selection = select_candidates(self._fleet.candidates(), demand, exclude=exclude)
        return bool(selection.free or selection.busy)

    def is_worth_waiting(self, demand: Demand) -> bool:
        """Whether a node that could serve this demand a moment ago may be able to in a moment."""
        probed = [candidate for candidate in self._fleet.candidates() if candidate.models is not None]
        return self._may_recover(probed, demand, frozenset())

    def _may_recover(self, candidates: Sequence[Candidate], demand: Demand, exclude: frozenset[str]) -> bool:
        """Whether any of these nodes is away now, may be back in a moment, and could then serve this demand."""
        return any(
            self._fleet[candidate.name].may_recover
            and candidate.name not in exclude
            and candidate.kind in demand.kinds
            and demand.node in (None, candidate.name)
            and has_model(candidate, demand.model)
            for candidate in candidates
        )

    # -- slots ---------------------------------------------------------------------------------------------------

    async def acquire(
        self,
        demand: Demand,
        *,
        exclude: frozenset[str] = frozenset(),
        timeout_s: float,
        since: float | None = None,
    ) -> Lease:
        """A slot on the best node for this demand.

        ``since``: the request was accepted at this time, and a node has failed it. It waits as if it had been in the
        queue from then on, and is not turned away when the queue is full.

        Raises NoNodeError or ModelMissing when no node could serve it, QueueFull past the bound, and DeadlineExceeded.
        """
        # Requests that wait already go first, unless no free slot is of use to them.
        if len(self._queue):
            self.grant_waiting()
        candidates = self._fleet.candidates()
        lease = self._take_slot(demand, exclude, candidates)
        if lease is not None:
            return lease
        waiter = _Waiter(demand, exclude, asyncio.get_running_loop().create_future())
        if not self._may_wait(waiter, candidates):
            raise no_node_error(candidates, demand, exclude=exclude)
        if self._queue.is_full and since is None:
            raise QueueFull(f"{len(self._queue)} requests wait already", retry_after_s=max(self._recent_wait_s, 1.0))
        return await self._wait(waiter, timeout_s, since)

    def acquire_despite_breaker(self, demand: Demand, *, exclude: frozenset[str]) -> Lease | None:
        """A free slot on a node that works, but failed so often lately that it is given no new requests.

        For a request that no other node can take any more: better than the error that its client would get."""
        return self._take_slot(demand, exclude, self._fleet.candidates(despite_breaker=True))

    def _take_slot(self, demand: Demand, exclude: frozenset[str], candidates: Sequence[Candidate]) -> Lease | None:
        """A slot that is free now, on the node that the policy ranks first."""
        free = select_candidates(candidates, demand, exclude=exclude).free
        if not free:
            return None
        if len(free) == 1:
            name = free[0].name
        else:
            self._turn += 1
            name = self._policy(free, demand, self._turn, self._rng)[0]
        return self._fleet[name].lease(demand)

    # -- the queue -----------------------------------------------------------------------------------------------

    async def _wait(self, waiter: _Waiter, timeout_s: float, since: float | None) -> Lease:
        began = self._clock()
        queued_at = began if since is None else since
        entry = self._queue.add(waiter, waiter.demand.priority, queued_at, bounded=since is None)
        try:
            async with asyncio.timeout(timeout_s):
                lease = await waiter.granted
        except TimeoutError:
            _return_grant(waiter)
            raise DeadlineExceeded(f"no place became free within {timeout_s:.0f} s") from None
        except asyncio.CancelledError:
            _return_grant(waiter)
            raise
        finally:
            self._queue.discard(entry)
        self._recent_wait_s += WAIT_SMOOTHING * (self._clock() - began - self._recent_wait_s)
        return lease

    def grant_waiting(self) -> None:
        """Grants the slots that are free, in the order of the queue. Called when a slot is freed or a node changes."""
        if not len(self._queue):
            return
        candidates = self._fleet.candidates()
        without_slot: set[Demand] = set()
        for entry in self._queue:
            waiter = entry.payload
            if waiter.granted.done():
                continue
            key = _selection_key(waiter.demand)
            if key in without_slot and not waiter.exclude:
                continue
            lease = self._take_slot(waiter.demand, waiter.exclude, candidates)
            if lease is not None:
                waiter.granted.set_result(lease)
                candidates = self._fleet.candidates()
            elif self._may_wait(waiter, candidates):
                without_slot.add(key)
            else:
                waiter.granted.set_exception(no_node_error(candidates, waiter.demand, exclude=waiter.exclude))

    def _may_wait(self, waiter: _Waiter, candidates: Sequence[Candidate]) -> bool:
        """Whether a node is busy that would serve it, or is away since less than the grace period."""
        demand = waiter.demand
        if select_candidates(candidates, demand, exclude=waiter.exclude).busy:
            waiter.hopeless_since = None
            return True
        if not self._may_recover(candidates, demand, waiter.exclude):
            return False
        now = self._clock()
        if waiter.hopeless_since is None:
            waiter.hopeless_since = now
        if self._recheck_timer is None:
            self._recheck_timer = asyncio.get_running_loop().call_later(RECHECK_S, self._recheck)
        return now - waiter.hopeless_since < self._grace_s

    def _recheck(self) -> None:
        """Notices what no event announces: the end of a breaker's pause, the end of a grace period."""
        self._recheck_timer = None
        self.grant_waiting()

    def close(self) -> None:
        if self._recheck_timer is not None:
            self._recheck_timer.cancel()


def _return_grant(waiter: _Waiter) -> None:
    """Gives back a slot that was granted in the very moment in which the waiter left."""
    granted = waiter.granted
    if granted.done() and not granted.cancelled() and granted.exception() is None:
        granted.result().discard()


def _selection_key(demand: Demand) -> Demand:
    """Equal for demands that the same nodes could serve."""
    return Demand(model=demand.model, kinds=demand.kinds, node=demand.node)
