"""``SharedPlaces``: takes and gives back the places of a mesh's requests on nodes that other gateways use too.

The dispatcher places a request as the scheduler decides, and then takes a place for it here. Mostly that needs no wait.
If the other gateways must be asked and deny the place, the request goes back into the queue. Here the best waiting
requests are announced to the others, so that a freed place goes to the best request of all gateways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from functools import partial

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.balancer.scheduling.waiting import Group, Waiting, could_serve
from gpumesh.coordination.base import Coordination, PlaceRequest
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.nodes.node import Node
from gpumesh.text.model_names import full_name

# If no waiting request has used a granted place, none is announced for its node during this time. Otherwise the place
# would be granted again at once.
REFUSED_S = 0.05
# To announce the waiting requests, all nodes are looked at. In a fleet of more nodes than LARGE_FLEET this is done once
# for all changes within LARGE_FLEET_S_PER_NODE for each node.
LARGE_FLEET = 32
LARGE_FLEET_S_PER_NODE = 0.0001
# A request that was denied so many places one after the other pauses before it asks again.
MAX_DENIALS = 3
DENIED_PAUSE_S = 0.02

_Head = tuple[NodeAccount, QueueEntry[Waiting]]
"""A waiting request, and the node for which it is announced."""


class SharedPlaces:
    """The places of the requests on the nodes of ``fleet``. ``scheduler`` has the waiting requests. ``clock`` returns
    monotonic seconds."""

    def __init__(
        self, fleet: Fleet, scheduler: Scheduler, coordination: Coordination, *, clock: Callable[[], float]
    ) -> None:
        self._fleet = fleet
        self._scheduler = scheduler
        self._queue = scheduler.queue
        self._coordination = coordination
        self._clock = clock
        self._held: dict[Lease, str] = {}  # the key of each place that a lease has
        self._soon: asyncio.Handle | None = None  # announces at the end of this turn
        self._later: asyncio.TimerHandle | None = None  # announces when a key is not refused any more
        # For each key for which requests were announced: the number and the limit of each of them.
        self._announced: dict[str, list[tuple[int, int | None]]] = {}
        self._refused_until: dict[str, float] = {}  # the keys of which a granted place was not used

    def __repr__(self) -> str:
        return f"<SharedPlaces, requests announced for {len(self._announced)} keys>"

    # -- the place of one request --------------------------------------------------------------------------------

    def take_now(self, lease: Lease) -> bool:
        """Takes a place for this lease if that needs no wait. Returns whether the lease has one."""
        key = lease.node.coordination_key
        if not self._coordination.take_now(key):
            return False
        self._keep(lease, key)
        return True

    async def take(self, lease: Lease, queued_at: float) -> bool:
        """Asks the other gateways for a place for this lease, unless the lease has one. ``queued_at``: the time at
        which the request came. If the place is denied, discards the lease and returns ``False``."""
        if lease.give_back_place is not None or lease.placement is None:  # ``None``: the request takes no slot
            return True
        key, placed, now = lease.node.coordination_key, lease.placement.placed, self._clock()
        demand, account = placed.demand, placed.account
        limit = find_place_limit(account, placed.model, now)
        cost = placed.work.cost
        request = PlaceRequest(limit, demand.priority, demand.client, max(now - queued_at, 0.0), cost)
        try:
            granted = await self._coordination.take(key, request)
        except BaseException:  # the client has gone
            lease.discard()
            raise
        if granted:
            self._keep(lease, key)
            return True
        self._update_others(account)  # before the slot is freed: no waiting request may take the node for free
        lease.discard()
        return False

    def _keep(self, lease: Lease, key: str) -> None:
        """Lets the lease give the place back at its end, under the key under which it was taken: the key of a node
        changes when its GPUs are seen."""
        self._held[lease] = key
        lease.give_back_place = partial(self._give_back, lease)

    def _give_back(self, lease: Lease, cost_correction: float) -> None:
        assert lease.placement is not None
        placed = lease.placement.placed
        key, demand = self._held.pop(lease), placed.demand
        self._coordination.release(key, demand.priority, demand.client, cost_correction)
        self._update_others(placed.account)

    def follow_keys(self) -> None:
        """The keys of nodes may have changed, because their GPUs are known now. Moves the places of their requests to
        the new keys, whether or not there is room."""
        for lease, key in self._held.items():
            new_key = lease.node.coordination_key
            if new_key != key and lease.placement is not None:
                demand = lease.placement.placed.demand
                self._held[lease] = new_key
                self._coordination.hold(new_key)
                self._coordination.release(key, demand.priority, demand.client)

    def _update_others(self, account: NodeAccount) -> None:
        """Tells the accounts of these GPUs what the other gateways have there. The first of them answers for all."""
        name = account.group.accounts[0].name
        node = self._fleet.get(name)
        if node is not None:  # otherwise the node has left the mesh
            node.update_other_loads()

    # -- what other gateways change ------------------------------------------------------------------------------

    def update(self, keys: Collection[str]) -> None:
        """Takes over what the other gateways have on the GPUs of these keys. Afterwards the waiting requests must be
        granted what is free."""
        for node in self._nodes_of(keys):
            node.update_other_loads()
            for account in node.account.group.accounts:
                self._scheduler.note_change(account)

    def note_granted(self, keys: Collection[str]) -> None:
        """The waiting requests have got what is free on the GPUs of these keys. Announces those that wait now."""
        nodes, now = self._nodes_of(keys), self._clock()
        for node in nodes:
            if any(self._refuses(node.account, group, now) for group in self._scheduler.groups()):
                self._refused_until[node.coordination_key] = now + REFUSED_S
        self._announce_for(nodes, [key for key in keys if key in self._announced])

    def _refuses(self, account: NodeAccount, group: Group, now: float) -> bool:
        """Whether requests of this group wait although the node has a free slot for them: they want a better node."""
        model = None if group.residency is None else group.residency.model
        return account.is_usable(now) and account.has_room(model, now) and could_serve(account, group, now)

    def _nodes_of(self, keys: Collection[str]) -> list[Node]:
        return [node for node in self._fleet if node.coordination_key in keys] if keys else []

    # -- announcements -------------------------------------------------------------------------------------------

    def announce_soon(self) -> None:
        """Announces the waiting requests at the end of this turn of the event loop, because some of them have changed;
        in a large fleet a moment later."""
        if self._soon is None and (self._announced or (self._queue.size and self._coordination.shared_keys())):
            loop = asyncio.get_running_loop()
            if len(self._fleet) > LARGE_FLEET:
                self._soon = loop.call_later(LARGE_FLEET_S_PER_NODE * len(self._fleet), self.announce)
            else:
                self._soon = loop.call_soon(self.announce)

    def announce(self) -> None:
        """Announces the best waiting requests for all shared keys."""
        self.close()
        self._announce_for(self._fleet, self._announced.copy())

    def _announce_for(self, nodes: Iterable[Node], keys: Iterable[str]) -> None:
        """Announces the best waiting requests for the keys of these nodes, as far as they are shared. ``keys`` of which
        no node is left are told that nothing waits."""
        now, shared = self._clock(), frozenset(self._coordination.shared_keys())
        heads: dict[str, list[_Head]] = {key: [] for key in keys}
        best: dict[tuple[int, ...], list[QueueEntry[Waiting]]] = {}  # by the groups: most nodes can serve the same ones
        if self._queue.size and shared:
            for node in nodes:
                key = node.coordination_key
                if key in shared and self._counts_for_group(node) and not self._is_refused(key, now):
                    groups = self._find_groups(node.account, now)
                    names = tuple(map(id, groups))
                    if names not in best:
                        best[names] = self._queue.best_of_each_class(groups)
                    heads.setdefault(key, []).extend((node.account, entry) for entry in best[names])
        for key, found in heads.items():
            self._announce(key, _best_of_each_class(found), now)
        if self._refused_until and self._later is None:
            delay_s = max(min(self._refused_until.values()) - now, 0.001)
            self._later = asyncio.get_running_loop().call_later(delay_s, self.announce)

    def _announce(self, key: str, heads: Collection[_Head], now: float) -> None:
        """Announces these requests for this key, unless they are announced already."""
        signature = []
        for account, entry in heads:
            model = entry.payload.demand.model
            limit = find_place_limit(account, None if model is None else full_name(model), now)
            signature.append((entry.sequence, limit))
        if signature == self._announced.get(key, []):
            return
        if signature:
            self._announced[key] = signature
        else:
            del self._announced[key]
        requests = [
            PlaceRequest(limit, entry.priority, entry.client, max(now - entry.queued_at, 0.0), entry.tokens)
            for (_, entry), (_, limit) in zip(heads, signature, strict=True)
        ]
        self._coordination.announce(key, requests)

    def _counts_for_group(self, node: Node) -> bool:
        """Whether the places of the node's key are those that count for its group of nodes that share GPUs. The first
        node of the group answers for all (``Node.update_other_loads``), so a place of another key would not be seen."""
        first = self._fleet.get(node.account.group.accounts[0].name)
        return first is None or first.coordination_key == node.coordination_key

    def _find_groups(self, account: NodeAccount, now: float) -> list[Group]:
        """The groups of waiting requests that this node could serve. Those that find a free slot there, but wait for a
        better node, are left out."""
        if not account.is_usable(now):
            return []
        return [
            group
            for group in self._scheduler.groups()
            if could_serve(account, group, now) and not self._refuses(account, group, now)
        ]

    def _is_refused(self, key: str, now: float) -> bool:
        """Whether a place of this key was granted a moment ago and no waiting request has used it."""
        until = self._refused_until.get(key)
        if until is None:
            return False
        if now < until:
            return True
        del self._refused_until[key]
        return False

    def close(self) -> None:
        """Stops the timers."""
        for handle in (self._soon, self._later):
            if handle is not None:
                handle.cancel()
        self._soon = self._later = None


def _best_of_each_class(
    heads: Iterable[_Head],
) -> list[_Head]:
    """Of the heads of nodes that share their GPUs, the oldest of each class."""
    best: dict[Priority, _Head] = {}
    for account, entry in heads:
        known = best.get(entry.priority)
        if known is None or entry.queued_at < known[1].queued_at:
            best[entry.priority] = (account, entry)
    return list(best.values())


def find_place_limit(account: NodeAccount, model: str | None, now: float) -> int | None:
    """How many places all gateways together may hold on the node's GPUs, so that a request to this model (a full name)
    gets one; ``None``: any number.

    A learned number of slots is for one model, while the places of all models are counted together. So the own requests
    to other models are added."""
    slots = account.slots(model or "", now)
    if slots is None or not account.counts_by_model:
        return slots
    members = account.group.accounts
    own = sum(len(member.placed) - member.placed_by_model.get(model or "", 0) for member in members)
    return slots + own
