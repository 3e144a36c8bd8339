"""``Dispatcher``: gives each request a slot on the chosen node; a request waits here while its nodes are busy or away.

The balancer chooses the node. ``acquire`` returns at once while a slot is free. Otherwise the request waits in the
mesh's queue until ``grant_waiting`` gives it a slot. So requests wait where people can see them, and not in Ollama's
queue. A request also waits for a node that is away only for a moment (reconnecting), but at most ``grace_s``.
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
from gpumesh.balancer.select import gpu_group, no_node_error, select_candidates, suits_demand
from gpumesh.errors import DeadlineExceeded, QueueFull
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.state import WaitingState
from gpumesh.topology import PolicyKind

GRACE_S = 6.0  # how long a request waits if all nodes that could serve it are away
RECHECK_S = 0.2  # between two attempts to grant slots while a request waits for such a node
MIN_RETRY_AFTER_S = 1.0  # the least that Retry-After says
WAIT_SMOOTHING = 0.2  # weight of the newest wait in the mean wait that is sent as Retry-After


@dataclass(slots=True)
class _Waiter:
    """A request that waits for a slot. ``exclude``: names of the nodes that have failed the request. ``granted`` gets
    the request's lease, or an error. ``recovery_wait_since``: since this time all nodes that could serve the request
    are away; ``None``: one of them is there."""

    demand: Demand
    exclude: frozenset[str]
    granted: asyncio.Future[Lease]
    recovery_wait_since: float | None = None


class Dispatcher:
    """Gives out the slots of ``fleet``: chooses nodes by ``policy``, and lets at most ``max_queue`` requests wait.

    ``clock`` returns monotonic seconds. ``grace_s``: how long a request waits if all nodes that could serve it are
    away."""

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
        self._turn = 0  # grows with each choice among several free nodes; policies rotate equal nodes by it
        self._queue: WaitQueue[_Waiter] = WaitQueue(max_queue)
        self._recent_wait_s = MIN_RETRY_AFTER_S  # the smoothed mean of the waits in the queue; at first a guess
        self._recheck_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Dispatcher {self._policy_kind.value} {len(self._queue)} queued>"

    # -- the state of the queue ----------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        return len(self._queue)

    def waiting(self, limit: int) -> tuple[WaitingState, ...]:
        """The first ``limit`` requests of the queue, in the order in which they are served."""
        now = self._clock()
        states: list[WaitingState] = []
        for position, entry in enumerate(islice(self._queue, limit)):
            demand, waited_s = entry.payload.demand, round(now - entry.queued_at, 3)
            states.append(WaitingState(position, entry.priority.value, demand.model, demand.node, waited_s, demand.id))
        return tuple(states)

    def queued_for(self, node: str) -> int:
        """The number of requests that wait for this node only, because their client named it."""
        if not self._queue.entries:  # the usual case, without sorting
            return 0
        return sum(entry.payload.demand.node == node for entry in self._queue)

    def slot_is_wanted(self, node: str) -> bool:
        """Whether any waiting request would take a slot of this node, or of a node that shares its GPU."""
        candidates = self._fleet.candidates()
        groups = {gpu_group(candidate) for candidate in candidates if candidate.name == node}
        # Many waiting requests often differ only in things that do not matter here. They have the same key, and only
        # the first of them is checked.
        checked_keys: set[tuple[Demand, frozenset[str]]] = set()
        for entry in self._queue:
            waiter = entry.payload
            demand = _selection_key(waiter.demand)
            key = (demand, waiter.exclude)
            is_leaving_queue = waiter.granted.done()
            if is_leaving_queue or key in checked_keys:
                continue
            checked_keys.add(key)
            busy = select_candidates(candidates, demand, exclude=waiter.exclude).busy
            would_take_slot = any(gpu_group(candidate) in groups for candidate in busy)
            if would_take_slot:
                return True
        return False

    # -- can a node serve a demand -------------------------------------------------------------------------------

    def could_serve(self, demand: Demand, *, exclude: frozenset[str]) -> bool:
        """Whether any node outside ``exclude`` can serve this demand, now or as soon as it has a free slot."""
        selection = select_candidates(self._fleet.candidates(), demand, exclude=exclude)
        return bool(selection.free or selection.busy)

    def is_worth_waiting(self, demand: Demand) -> bool:
        """Whether a node that could serve this demand a moment ago is away, but may come back in a moment. A node that
        has never listed its models does not count: it has not worked before."""
        probed = [candidate for candidate in self._fleet.candidates() if candidate.models is not None]
        return self._any_may_recover(probed, demand, exclude=frozenset())

    def _any_may_recover(self, candidates: Sequence[Candidate], demand: Demand, exclude: frozenset[str]) -> bool:
        """Whether any of these nodes is away now, may come back in a moment, and could then serve this demand."""
        for candidate in candidates:
            is_suited = candidate.name not in exclude and suits_demand(candidate, demand)
            if is_suited and self._fleet[candidate.name].may_recover(demand.model):
                return True
        return False

    # -- slots ---------------------------------------------------------------------------------------------------

    def acquire_now(self, demand: Demand, exclude: frozenset[str]) -> Lease | None:
        """Takes a slot that is free now, on the best node for this demand. Returns ``None`` if there is none."""
        if self._queue.entries:  # the requests that wait already choose first among the free slots
            self.grant_waiting()
        return self._take_slot(demand, exclude, self._fleet.candidates())

    async def acquire(
        self,
        demand: Demand,
        *,
        exclude: frozenset[str] = frozenset(),
        timeout_s: float,
        since: float | None = None,
    ) -> Lease:
        """Takes a slot on the best node for this demand, and waits for a slot if necessary. ``exclude``: names of nodes
        that must not be used.

        ``since`` is given for a request that a node has failed: it is the time when the request was accepted. The
        request then gets the place in the queue that belongs to this time, and is not refused if the queue is full.

        Raises NoNodeError or ModelMissing if no node could serve the demand, QueueFull if the queue is full, and
        DeadlineExceeded if no slot became free in time.
        """
        lease = self.acquire_now(demand, exclude)
        if lease is not None:
            return lease
        candidates = self._fleet.candidates()
        waiter = _Waiter(demand, exclude, asyncio.get_running_loop().create_future())
        if not self._may_wait(waiter, candidates):
            raise no_node_error(candidates, demand, exclude=exclude)
        if self._queue.is_full and since is None:  # a request that a node has failed was accepted before
            retry_after_s = max(self._recent_wait_s, MIN_RETRY_AFTER_S)
            raise QueueFull(f"{len(self._queue)} requests wait already", retry_after_s=retry_after_s)
        return await self._wait(waiter, timeout_s, since)

    def acquire_despite_breaker(self, demand: Demand, *, exclude: frozenset[str]) -> Lease | None:
        """Takes a free slot on a node whose server answers probes, even if the node's breaker is open because requests
        failed there lately. Returns ``None`` if there is none.

        This is for a request that no other node can take any more: an attempt on such a node is better than an
        error."""
        return self._take_slot(demand, exclude, self._fleet.candidates(despite_breaker=True))

    def _take_slot(self, demand: Demand, exclude: frozenset[str], candidates: Sequence[Candidate]) -> Lease | None:
        """Takes a slot that is free now, on the node that the policy ranks first. Returns ``None`` if there is none."""
        free = select_candidates(candidates, demand, exclude=exclude).free
        if not free:
            return None
        if len(free) == 1:
            name = free[0].name
        else:
            self._turn += 1
            ranked_names = self._policy(free, demand, self._turn, self._rng)
            name = ranked_names[0]
        return self._fleet[name].lease(demand)

    # -- the queue -----------------------------------------------------------------------------------------------

    async def _wait(self, waiter: _Waiter, timeout_s: float, since: float | None) -> Lease:
        """Puts the request into the queue, and returns the lease that ``grant_waiting`` gives to the request. ``since``
        and the errors are as for ``acquire``."""
        started_at = self._clock()
        queued_at = started_at if since is None else since
        was_accepted_before = since is not None  # then a full queue does not refuse the request
        entry = self._queue.add(waiter, waiter.demand.priority, queued_at, bounded=not was_accepted_before)
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
        self._recent_wait_s += WAIT_SMOOTHING * (self._clock() - started_at - self._recent_wait_s)
        return lease

    def grant_waiting(self) -> None:
        """Gives the free slots to the waiting requests, in the order of the queue. A request that no node can serve any
        more gets an error. Called when a slot is freed or a node changes."""
        if not self._queue.entries:
            return
        candidates = self._fleet.candidates()
        demands_without_slot: set[Demand] = set()
        for entry in self._queue:
            waiter = entry.payload
            if waiter.granted.done():  # the request leaves the queue as soon as its task runs
                continue
            # A request before this one, which the same nodes can serve, got no slot. With ``exclude``, fewer nodes can
            # serve a request than its demand says, so such a request says nothing about the others.
            key = None if waiter.exclude else _selection_key(waiter.demand)
            if key in demands_without_slot:
                continue
            lease = self._take_slot(waiter.demand, waiter.exclude, candidates)
            if lease is not None:
                waiter.granted.set_result(lease)
                candidates = self._fleet.candidates()  # the lease has changed the load of its node
            elif self._may_wait(waiter, candidates):
                if key is not None:
                    demands_without_slot.add(key)
            else:
                waiter.granted.set_exception(no_node_error(candidates, waiter.demand, exclude=waiter.exclude))

    def _may_wait(self, waiter: _Waiter, candidates: Sequence[Candidate]) -> bool:
        """Whether the request may wait: a busy node could serve it, or the nodes that could serve it are away, but not
        longer than the grace period, and may come back. Starts the grace period when all these nodes are away, and ends
        it when one of them is back."""
        demand = waiter.demand
        if select_candidates(candidates, demand, exclude=waiter.exclude).busy:
            waiter.recovery_wait_since = None
            return True
        if not self._any_may_recover(candidates, demand, waiter.exclude):
            return False
        now = self._clock()
        if waiter.recovery_wait_since is None:
            waiter.recovery_wait_since = now
        if self._recheck_timer is None:
            self._recheck_timer = asyncio.get_running_loop().call_later(RECHECK_S, self._recheck)
        return now - waiter.recovery_wait_since < self._grace_s

    def _recheck(self) -> None:
        """Grants slots after a breaker's pause, and refuses requests after a grace period. No event announces that such
        a time is over, so this runs every ``RECHECK_S`` while a request waits for a node that is away."""
        self._recheck_timer = None
        self.grant_waiting()

    def close(self) -> None:
        if self._recheck_timer is not None:
            self._recheck_timer.cancel()


def _return_grant(waiter: _Waiter) -> None:
    """Gives back the slot if one was granted in the same moment in which the request stopped waiting."""
    granted = waiter.granted
    has_lease = granted.done() and not granted.cancelled() and granted.exception() is None
    if has_lease:
        granted.result().discard()


def _selection_key(demand: Demand) -> Demand:
    """The demand with only the members that decide which nodes can serve it. Demands that the same nodes can serve
    have equal keys."""
    return Demand(
        model=demand.model, kinds=demand.kinds, node=demand.node, nodes=demand.nodes, needs_slot=demand.needs_slot
    )
