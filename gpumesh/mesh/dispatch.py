"""``Dispatcher``: gives each request a slot on the chosen node; a request waits here while its nodes are busy or away.

The balancer's ``Scheduler`` decides. ``acquire`` returns at once while a slot is free. Otherwise the request waits in
the scheduler's queue until ``grant_waiting`` gives it a slot. So requests wait where people can see them, and not in
Ollama's queue. A request also waits for a node that is away only for a moment (reconnecting), but at most ``grace_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from itertools import islice

from gpumesh.backends.dialects import find_dialect
from gpumesh.balancer.base import Demand
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.balancer.scheduling.waiting import Group, Waiting, could_serve, demand_of
from gpumesh.balancer.select import allows_node, no_node_error, suits_demand
from gpumesh.errors import DeadlineExceeded, GPUMeshError, QueueFull
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.shared_places import DENIED_PAUSE_S, MAX_DENIALS, SharedPlaces
from gpumesh.state import WaitingState

GRACE_S = 6.0  # how long a request waits if all nodes that could serve it are away
# A node whose first connection and first probe are on their way is waited for longer: it is new in the mesh, and most
# likely works. A host that does not answer is known after its connect time-out, which is mostly 6 s.
OPENING_S = 30.0
RECHECK_S = 0.2  # while a request waits for a node that is away, the nodes are looked at so often
MIN_RETRY_AFTER_S = 1.0  # the least that Retry-After says


class Dispatcher:
    """Gives out the slots of ``fleet`` as ``scheduler`` decides.

    ``clock`` returns monotonic seconds. ``grace_s``: how long a request waits if all nodes that could serve it are
    away. ``places`` are those that other gateways share; ``None``: there are no other gateways."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        grace_s: float = GRACE_S,
        places: SharedPlaces | None = None,
    ) -> None:
        self.asks_others = places is not None
        """Whether ``acquire`` may have to ask other gateways, so that ``acquire_now`` must not be called."""
        self._places = places
        self._fleet = fleet
        self._scheduler = scheduler
        self._queue = scheduler.queue
        self._clock = clock
        self._grace_s = grace_s
        self._turn = 0  # counts the requests without a slot, so that equal nodes take turns
        # The groups of which all nodes that could serve them are away, and since when that is so.
        self._away_since: dict[Group, float] = {}
        self._groups_may_fail = False  # whether, since the last look, a group may have lost its last node
        self._timer: asyncio.TimerHandle | None = None  # runs until the queue must be checked again

    def __repr__(self) -> str:
        return f"<Dispatcher {self._queue.size} queued>"

    # -- the state of the queue ----------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """The number of requests that wait."""
        return self._queue.size

    def waiting(self, limit: int) -> tuple[WaitingState, ...]:
        """The first ``limit`` requests of the queue, in the order in which they are served."""
        if not self._queue.size:
            return ()
        now = self._clock()
        states: list[WaitingState] = []
        for position, entry in enumerate(islice(self._queue, limit)):
            demand, waited_s = entry.payload.demand, round(now - entry.queued_at, 3)
            states.append(WaitingState(position, entry.priority.value, demand.model, demand.node, waited_s, demand.id))
        return tuple(states)

    def queued_for(self, node: str) -> int:
        """The number of requests that wait for this node only, because their client named it."""
        return sum(self._queue.size_of(group) for group in self._scheduler.groups() if group.node == node)

    def slot_is_wanted(self, node: str) -> bool:
        """Whether any waiting request would take a slot of this node, or of a node that shares its GPU."""
        account = self._scheduler.accounts.get(node)
        if account is None:  # the node was removed while this request ran there
            return False
        members, now = account.group.accounts, self._clock()
        groups = self._scheduler.groups()
        return any(could_serve(member, group, now) for group in groups for member in members)

    # -- can a node serve a demand -------------------------------------------------------------------------------

    def could_serve(self, demand: Demand, *, exclude: frozenset[str]) -> bool:
        """Whether any node outside ``exclude`` can serve this demand, now or as soon as it has a free slot."""
        return self._scheduler.choice.can_serve(demand, self._clock(), exclude=exclude)

    def find_node(self, demand: Demand) -> str | None:
        """The name of a node that can serve this demand, now or as soon as it has a free slot. ``None``: there is
        none."""
        accounts = self._scheduler.choice.select(demand, self._clock())
        return accounts[0].name if accounts else None

    def is_worth_waiting(self, demand: Demand) -> bool:
        """Whether a node that could serve this demand is away now, but has worked before and may come back in a
        moment. (A node that has never listed its models has not worked before.)"""
        return self._any_may_recover(demand, frozenset(), only_probed=True)

    def _any_may_recover(
        self, demand: Demand, exclude: frozenset[str], *, only_probed: bool = False, only_opening: bool = False
    ) -> bool:
        """Whether any node outside ``exclude`` is away now, may come back in a moment, and could then serve this
        demand. ``only_probed``: a node that has never listed its models does not count. ``only_opening``: only a node
        counts that has just been opened, and has not reported yet."""
        now = self._clock()
        for node in self._fleet:
            account = node.account
            if node.name in exclude or (only_probed and account.models is None):
                continue
            if only_opening and (node.reported or now - node.opened_at >= OPENING_S):
                continue
            # Of a node that has just been added, the kind of its server is not known: it may be the demanded one.
            is_new = find_dialect(account.kind) is None and allows_node(demand, node.name)
            if (is_new or suits_demand(account, demand)) and node.may_recover(demand.model):
                return True
        return False

    # -- slots ---------------------------------------------------------------------------------------------------

    def acquire_now(self, demand: Demand, exclude: frozenset[str]) -> Lease | None:
        """Takes a slot on the best node for this demand. Returns ``None`` if the request should wait: there is no free
        slot, or another node is worth waiting for. Only if there are no other gateways (``asks_others``)."""
        return self._place_now(demand, exclude)

    def _place_now(self, demand: Demand, exclude: frozenset[str]) -> Lease | None:
        """Does the work of ``acquire_now``. If there are other gateways, the lease may still need a place."""
        if self._queue.size:  # the requests that wait already come first: they get what is free now
            self.grant_waiting()
        if not demand.needs_slot:
            return self._lease_without_slot(demand, exclude)
        placement = self._scheduler.place_now(demand, self._clock(), exclude=exclude)
        return None if placement is None else self._lease(placement)

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

        ``since`` is given for a request whose last attempt on a node has failed: it is the time when the request was
        accepted. The request then gets the place in the queue that belongs to this time, and is not refused if the
        queue is full.

        Raises NoNodeError or ModelMissing if no node could serve the demand, QueueFull if the queue is full, and
        DeadlineExceeded if no slot became free in time.
        """
        if self._places is None:
            return await self._acquire_slot(demand, exclude, timeout_s, since)
        came_at, denials = self._clock(), 0
        while True:
            left_s = timeout_s - (self._clock() - came_at)
            lease = await self._acquire_slot(demand, exclude, left_s, since)
            since = came_at if since is None else since
            if await self._places.take(lease, since):
                return lease
            # Other gateways have filled the node. Another node may have a slot. If none has, the request waits in the
            # queue, at the place that belongs to the time when it came.
            denials += 1
            if denials >= MAX_DENIALS:
                await asyncio.sleep(DENIED_PAUSE_S)

    async def _acquire_slot(
        self, demand: Demand, exclude: frozenset[str], timeout_s: float, since: float | None
    ) -> Lease:
        """Does the work of ``acquire``, as far as this gateway alone decides."""
        lease = self._place_now(demand, exclude)
        if lease is not None:
            return lease
        could_serve = self.could_serve(demand, exclude=exclude)
        if not could_serve and not self._any_may_recover(demand, exclude):
            raise self._no_node_error(demand, exclude)
        if not demand.needs_slot:
            return await self._wait_without_slot(demand, exclude, timeout_s)
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        now = self._clock()
        try:
            entry = self._scheduler.wait(demand, now, granted, exclude=exclude, accepted_at=since)
        except OverflowError as error:  # the queue is full
            # Perhaps a slot is free, but another node was worth waiting for. Better this slot than an error.
            placement = self._scheduler.place_now(demand, now, exclude=exclude, may_wait=False)
            if placement is not None:
                return self._lease(placement)
            retry_after_s = max(self._queue.waits.usual_s(demand.priority), MIN_RETRY_AFTER_S)
            raise QueueFull(str(error), retry_after_s=retry_after_s) from None
        self._groups_may_fail |= not could_serve  # the request waits for nodes that are away
        self.grant_waiting()
        try:
            async with asyncio.timeout(timeout_s):
                lease = await granted
        except TimeoutError:
            _return_grant(granted)
            raise _deadline_error(timeout_s) from None
        except asyncio.CancelledError:  # the client has gone
            _return_grant(granted)
            raise
        finally:
            self._queue.discard(entry)
            self._announce_soon()
        self._queue.waits.record(demand.priority, self._clock() - now)
        return lease

    async def acquire_despite_breaker(self, demand: Demand, *, exclude: frozenset[str]) -> Lease | None:
        """Takes a free slot on a node whose server answers probes, even if the node's breaker is open because requests
        failed there lately. Returns ``None`` if no such node has a free slot.

        This is for a request that no other node can take any more: an attempt on such a node is better than an
        error."""
        if not demand.needs_slot:
            return self._lease_without_slot(demand, exclude, despite_breaker=True)
        placement = self._scheduler.place_now(
            demand, self._clock(), exclude=exclude, despite_breaker=True, may_wait=False
        )
        if placement is None:
            return None
        lease = self._lease(placement)
        if self._places is None or await self._places.take(lease, self._clock()):
            return lease
        return None

    def _lease(self, placement: Placement) -> Lease:
        """The lease for a request that the scheduler has placed. If there are other gateways, it has a place where none
        of them must be asked."""
        placed = placement.placed
        lease = self._fleet[placed.account.name].lease(placed.demand, placement)
        if self._places is not None:
            self._places.take_now(lease)
        return lease

    def _lease_without_slot(
        self, demand: Demand, exclude: frozenset[str], *, despite_breaker: bool = False
    ) -> Lease | None:
        """A lease for a request that costs no inference, on the least busy node. ``None`` if no node can serve it
        now."""
        accounts = self._scheduler.choice.select(
            demand, self._clock(), exclude=exclude, despite_breaker=despite_breaker
        )
        if not accounts:
            return None
        start = self._turn % len(accounts)  # equal nodes take turns
        self._turn += 1
        in_turn = (*accounts[start:], *accounts[:start])
        least_busy = min(in_turn, key=lambda account: (account.in_flight + 1) / account.weight)
        return self._fleet[least_busy.name].lease(demand, None)

    async def _wait_without_slot(self, demand: Demand, exclude: frozenset[str], timeout_s: float) -> Lease:
        """Waits until a node is back that can serve a request without a slot. Such a request needs no place in the
        queue: it waits only while no node can serve it. Raises as ``acquire`` does."""
        started_at = self._clock()
        while self._any_may_recover(demand, exclude):
            waited_s = self._clock() - started_at
            if waited_s >= timeout_s:
                raise _deadline_error(timeout_s)
            if waited_s >= self._grace_s and not self._any_may_recover(demand, exclude, only_opening=True):
                break
            await asyncio.sleep(min(RECHECK_S, timeout_s - waited_s))
            lease = self._lease_without_slot(demand, exclude)
            if lease is not None:
                return lease
        raise self._no_node_error(demand, exclude)

    def _no_node_error(self, demand: Demand, exclude: frozenset[str]) -> GPUMeshError:
        return no_node_error(self._fleet.candidates(), demand, exclude=exclude)

    # -- the queue -----------------------------------------------------------------------------------------------

    def note_nodes_changed(self) -> None:
        """Grants slots again, and looks for requests that have no node any more: a node may have been lost, or may
        serve other models than before."""
        self._groups_may_fail = True
        if self._places is not None:
            self._places.follow_keys()
        self.grant_waiting()

    def note_places_changed(self, keys: Collection[str]) -> None:
        """Other gateways have taken or given back places on the GPUs of these keys, or a place was granted."""
        if self._places is not None:
            self._places.update(keys)
            self.grant_waiting()
            self._places.note_granted(keys)

    def _announce_soon(self) -> None:
        """Tells other gateways soon which requests wait, because they have changed."""
        if self._places is not None:
            self._places.announce_soon()

    def grant_waiting(self) -> None:
        """Gives the free slots to the waiting requests. A request that no node can serve any more gets an error. Called
        when a slot is freed or a node changes."""
        self._announce_soon()
        if not self._queue.size:
            self._away_since.clear()
            return
        for entry, placement in self._scheduler.grants(self._clock()):
            granted = _future(entry)
            if granted.done():  # the request was cancelled; its task leaves the queue as soon as it runs
                self._lease(placement).discard()
            else:
                granted.set_result(self._lease(placement))
        if self._groups_may_fail or self._away_since:
            self._groups_may_fail = False
            self._refuse_hopeless()
        self._set_timer()

    def _refuse_hopeless(self) -> None:
        """Gives an error to the waiting requests that no node can serve, now or in a moment.

        A request whose nodes may come back waits for the whole grace period. The period begins when its nodes went
        away, or when the request came, if that was later."""
        now = self._clock()
        away_since = {}
        for group in tuple(self._scheduler.groups()):
            demand = demand_of(group)
            if self._scheduler.choice.can_serve(demand, now, exclude=group.exclude):
                continue
            since = away_since[group] = self._away_since.get(group, now)
            may_recover = self._any_may_recover(demand, group.exclude)
            if may_recover and now - since < self._grace_s:
                continue
            if may_recover and self._any_may_recover(demand, group.exclude, only_opening=True):
                continue
            for entry in self._queue.entries_of(group):
                if not may_recover or now - entry.payload.joined_at >= self._grace_s:
                    self._queue.discard(entry)
                    _refuse(entry, self._no_node_error(demand, group.exclude))
        self._away_since = away_since

    def _set_timer(self) -> None:
        """Sets the timer for what no event announces: that a breaker's pause, a request's patience or a grace period is
        over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        next_check = self._scheduler.next_check()
        delay_s = None if next_check is None else max(next_check - now, 0.0)
        if self._away_since:
            delay_s = RECHECK_S if delay_s is None else min(delay_s, RECHECK_S)
        if delay_s is not None and self._queue.size:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._recheck)

    def _recheck(self) -> None:
        """Looks at the queue again when the timer has run out."""
        self._timer = None
        if self._away_since:  # the scheduler must look at all nodes again: a node that was away may be back
            for node in self._fleet:
                self._scheduler.note_change(node.account)
        self.grant_waiting()

    def close(self) -> None:
        """Stops the timers."""
        if self._timer is not None:
            self._timer.cancel()
        if self._places is not None:
            self._places.close()


def _refuse(entry: QueueEntry[Waiting], error: GPUMeshError) -> None:
    """Lets ``acquire`` raise this error, unless it has ended in this moment."""
    granted = _future(entry)
    if not granted.done():
        granted.set_exception(error)


def _deadline_error(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no place became free within {timeout_s:.0f} s")


def _future(entry: QueueEntry[Waiting]) -> asyncio.Future[Lease]:
    """The future that ``acquire`` waits for."""
    future = entry.payload.payload
    assert isinstance(future, asyncio.Future), "not the payload that ``acquire`` gave to ``Scheduler.wait``"
    return future


def _return_grant(granted: asyncio.Future[Lease]) -> None:
    """Gives back the slot if one was granted in the same moment in which the request stopped waiting."""
    has_lease = granted.done() and not granted.cancelled() and granted.exception() is None
    if has_lease:
        granted.result().discard()
