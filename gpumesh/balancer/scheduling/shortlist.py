"""``Shortlist``: of a large fleet, the few nodes that are worth ranking for a request. Pure.

To forecast the cost of each request on each of a thousand nodes takes too long. So the nodes that suit a request are
kept in bags. The bag of a node says what decides the cost most: whether the model is in memory, and whether a slot is
free. A few nodes of each bag, drawn at random, are ranked, and also the nodes that have the beginning of the prompt.
When an account changes, its node is put into another bag, so no decision looks at all nodes. If any suitable node has a
free slot, at least one such node is ranked.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from math import gcd
from random import Random
from typing import NamedTuple

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.select import suits_demand
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendKind

MAX_RANKED_WHOLE = 24  # a fleet with no more nodes is ranked whole
MAX_TABLES = 64  # a client can ask for any context length, and each length makes a table
# The most nodes of each sort that are ranked: each ranked node costs time. Of the nodes with the model in memory and a
# free slot, two of each of the fastest classes of pace are taken. The other sorts matter only if these nodes are few
# or slow.
MAX_CACHED = 3  # nodes that have the beginning of the prompt in their cache
MAX_PREFERRED = 4
MAX_WARM_FREE = 4
MAX_FROM_PACE_CLASS = 2
PACE_CLASSES = 4  # classes of pace between a node and a node that is twice as fast
MAX_COLD_FREE = 1
MAX_WARM_FULL = 2
# A node that cannot load the model now (another load runs, or a model must stay) is looked at again after this time.
MIN_BLOCKED_S, MAX_BLOCKED_S = 0.01, 1.0


class Bag(IntEnum):
    """The state of a node for a request. *Warm*: the server has the model in memory, with the options of the
    request. *Empty*: it has no model in memory, so that a load pushes nothing out."""

    WARM_FREE = 0
    EMPTY_FREE = 1
    COLD_FREE = 2
    WARM_FULL = 3
    COLD_FULL = 4


_Place = tuple[int, Bag, int]
"""A node's tier, its bag, and the class of its pace (``NodeTable._find_pace``; 0 in all bags but the warm free)."""

FREE_BAGS = (Bag.WARM_FREE, Bag.EMPTY_FREE, Bag.COLD_FREE)


class _TableKey(NamedTuple):
    """What decides which nodes suit a request, and which of them are warm."""

    model: str | None
    residency: ResidencyKey | None
    kinds: frozenset[BackendKind]
    nodes: frozenset[str] | None


class _NodeBag:
    """Nodes in no order. To add, to remove or to draw a node takes the same time in a bag of any size."""

    __slots__ = ("_accounts", "_positions")

    def __init__(self) -> None:
        self._accounts: list[NodeAccount] = []
        self._positions: dict[str, int] = {}  # the index in ``_accounts``, by the name of the node

    def __len__(self) -> int:
        return len(self._accounts)

    def add(self, account: NodeAccount) -> None:
        self._positions[account.name] = len(self._accounts)
        self._accounts.append(account)

    def remove(self, name: str) -> None:
        """Removes the node, and moves the last node of the list to its position."""
        position = self._positions.pop(name)
        last = self._accounts.pop()
        if last.name != name:
            self._accounts[position] = last
            self._positions[last.name] = position

    def shuffled(self, rng: Random) -> Iterator[NodeAccount]:
        """Yields each node once, in an order that looks random: from a random start, with a step that leads to each
        node once. This is faster than a shuffle of all nodes."""
        accounts = self._accounts
        count = len(accounts)
        if not count:
            return
        step = max(int(count * 0.618), 1)
        while gcd(step, count) > 1:  # otherwise the steps would not lead to all nodes
            step += 1
        position = int(rng.random() * count)
        for _ in range(count):
            yield accounts[position]
            position = (position + step) % count


class NodeTable:
    """The nodes that suit one sort of request (``demand`` is an example), in bags by tier."""

    def __init__(self, demand: Demand, accounts: Mapping[str, NodeAccount]) -> None:
        self.warm_slots = 0
        """The slots for the model on the nodes that have it in memory."""
        self._demand = demand
        self._model = None if demand.residency is None else demand.residency.model
        self._bags: dict[_Place, _NodeBag] = {}
        self._tiers: list[int] = []  # of all nodes that ever were in a bag, sorted
        self._bag_of: dict[str, _Place] = {}  # for each node that is up and suits the request
        self._free_count = 0  # the nodes in ``FREE_BAGS``
        self._warm_slots_of: dict[str, int] = {}  # for each warm node
        self._changed: dict[str, NodeAccount] = dict(accounts)  # since the last ``refresh``
        # The nodes that cannot load the model before a certain time: by name, and as a heap, the earliest time first.
        self._blocked_until: dict[str, float] = {}
        self._blocked_heap: list[tuple[float, str]] = []
        self._accounts = accounts

    def __repr__(self) -> str:
        bags = (f"tier {tier} {bag.name} {len(nodes)}" for (tier, bag, _), nodes in self._bags.items())
        return f"<NodeTable {self._model} {', '.join(bags)}>"

    # -- changes -------------------------------------------------------------------------------------------------

    def note_change(self, account: NodeAccount) -> None:
        """The node may belong into another bag."""
        self._changed[account.name] = account

    def note_blocked(self, name: str, until: float) -> None:
        """The node has a free slot, but it cannot load the model before this time."""
        self._blocked_until[name] = until
        heapq.heappush(self._blocked_heap, (until, name))
        self.note_change(self._accounts[name])

    def refresh(self, now: float) -> None:
        """Puts the changed nodes, and the nodes that are not blocked any more, into their bags."""
        while self._blocked_heap and self._blocked_heap[0][0] <= now:
            _, name = heapq.heappop(self._blocked_heap)
            if self._blocked_until.get(name, now) <= now:  # otherwise the node was blocked again, for longer
                self._blocked_until.pop(name, None)
                self._changed[name] = self._accounts[name]
        if self._changed:
            for account in self._changed.values():
                self._put(account, now)
            self._changed.clear()

    def _put(self, account: NodeAccount, now: float) -> None:
        """Moves the node into the bag where it belongs now, and updates the number of warm slots."""
        name, old = account.name, self._bag_of.get(account.name)
        new: _Place | None = None
        warm_slots = 0
        if account.is_up and suits_demand(account, self._demand):
            bag_kind = self._find_bag(account, now)
            pace = self._find_pace(account) if bag_kind is Bag.WARM_FREE else 0
            new = (account.tier, bag_kind, pace)
            if bag_kind in (Bag.WARM_FREE, Bag.WARM_FULL):
                warm_slots = account.slots(self._model or "", now) or 1
        old_slots = self._warm_slots_of.get(name)
        if warm_slots != old_slots:
            self.warm_slots += warm_slots - (old_slots or 0)
            self._warm_slots_of[name] = warm_slots
        if new == old:
            return
        if old is not None:
            self._free_count -= old[1] in FREE_BAGS
            self._bags[old].remove(name)
            del self._bag_of[name]
            if not self._bags[old]:
                del self._bags[old]
        if new is not None:
            self._bag_of[name] = new
            self._free_count += new[1] in FREE_BAGS
            bag = self._bags.get(new)
            if bag is None:
                bag = self._bags[new] = _NodeBag()
                if account.tier not in self._tiers:
                    self._tiers = sorted((*self._tiers, account.tier))
            bag.add(account)

    def _find_bag(self, account: NodeAccount, now: float) -> Bag:
        """The bag of a node that suits the request. A node that cannot load the model now counts as full."""
        key, residency = self._demand.residency, account.residency
        is_free = account.has_room(self._model, now)
        if key is None or residency.is_resident(key):
            return Bag.WARM_FREE if is_free else Bag.WARM_FULL
        if not is_free or account.name in self._blocked_until or residency.next_load_starts_at(now) > now:
            return Bag.COLD_FULL
        return Bag.COLD_FREE if residency.loaded else Bag.EMPTY_FREE

    def _find_pace(self, account: NodeAccount) -> int:
        """The class of the node's pace: the time for each token of one more answer, written beside the answers that run
        there now. Each class is slower than the class before it by a factor of 1.2; the lowest is the fastest."""
        pace = account.rates.pace(self._model or "")
        token_s = pace.token_s * (1.0 + pace.share * (account.streams + account.activity.reading))
        return round(PACE_CLASSES * math.log2(max(token_s * account.slowness / account.weight, 1e-9)))

    # -- questions -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[NodeAccount]:
        """The nodes that are up and suit the request. Nodes with a free slot come first."""
        for place in sorted(self._bags, key=lambda place: place[1]):
            yield from self._bags[place]._accounts

    def __len__(self) -> int:
        return len(self._bag_of)

    def is_suitable(self, name: str) -> bool:
        return name in self._bag_of

    @property
    def has_free(self) -> bool:
        """Whether any node has a free slot for this request, and may load its model now if it must."""
        return self._free_count > 0

    def is_free(self, name: str) -> bool:
        """Whether the node has a free slot for this request, and may load its model now if it must."""
        place = self._bag_of.get(name)
        return place is not None and place[1] in FREE_BAGS

    def draw(self, tier: int, bag: Bag, rng: Random) -> Iterator[NodeAccount]:
        """Yields the nodes of a bag in random order."""
        nodes = self._bags.get((tier, bag, 0))
        return iter(()) if nodes is None else nodes.shuffled(rng)

    def draw_fastest(self, tier: int, rng: Random) -> Iterator[NodeAccount]:
        """Yields the warm nodes with a free slot: a few of each class of pace, the fastest first; then the others."""
        paces = sorted(place[2] for place in self._bags if place[0] == tier and place[1] is Bag.WARM_FREE)
        remaining: list[Iterator[NodeAccount]] = []
        for pace in paces:
            nodes = self._bags[tier, Bag.WARM_FREE, pace].shuffled(rng)
            yield from islice(nodes, MAX_FROM_PACE_CLASS)
            remaining.append(nodes)
        for nodes in remaining:
            yield from nodes

    @property
    def tiers(self) -> Sequence[int]:
        return self._tiers


class Shortlist:
    """The tables of a fleet. ``accounts`` are all its nodes; the owner adds to them, and then calls ``note_added``.
    ``is_needed``: the fleet is too large to be ranked whole."""

    def __init__(self, accounts: Mapping[str, NodeAccount], rng: Random) -> None:
        self._accounts = accounts
        self.is_needed = len(accounts) > MAX_RANKED_WHOLE
        self._rng = rng
        self._tables: OrderedDict[_TableKey, NodeTable] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Shortlist {len(self._accounts)} nodes, {len(self._tables)} tables>"

    def note_added(self, account: NodeAccount) -> None:
        """A node was added to the accounts."""
        self.is_needed = len(self._accounts) > MAX_RANKED_WHOLE
        self.note_change(account)

    def note_change(self, account: NodeAccount) -> None:
        """The node's slots, models or state may have changed."""
        if not account.is_removed:
            for table in self._tables.values():
                table.note_change(account)

    def clear(self) -> None:
        """Forgets all tables, because a node was removed."""
        self.is_needed = len(self._accounts) > MAX_RANKED_WHOLE
        self._tables.clear()

    def table(self, demand: Demand, now: float) -> NodeTable:
        """The nodes that suit the demand, which must have its residency key, and name no node. Only the first call for
        a sort of demand looks at all nodes, to make the table."""
        key = _TableKey(demand.model, demand.residency, demand.kinds, demand.nodes)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = NodeTable(demand, self._accounts)
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
        table.refresh(now)
        return table

    def pick(
        self,
        demand: Demand,
        cached: Mapping[str, float],
        now: float,
        *,
        exclude: Collection[str] = (),
        needs_free: bool = False,
    ) -> list[NodeAccount]:
        """The nodes to rank: first nodes that have the beginning of the prompt, then nodes that mesh.yaml prefers, then
        some nodes of each sort, from the best tier down. ``cached``: how many tokens of the prompt each node has.
        ``exclude``: names of nodes that must not be used. ``needs_free``: returns no nodes if none of them would have a
        free slot."""
        table = self.table(demand, now)
        picked: dict[str, NodeAccount] = {}
        usable = _UsableCheck(demand, now, exclude)
        if len(table) <= MAX_RANKED_WHOLE:
            return [account for account in table if usable.allows(account)]
        if cached:
            names = cached if len(cached) <= MAX_CACHED else heapq.nlargest(MAX_CACHED, cached, key=cached.__getitem__)
            self._add_named(picked, names, table, usable)
        if needs_free and not table.has_free:
            # A node that must not load the model yet may have a free slot all the same.
            model = None if demand.residency is None else demand.residency.model
            if not any(account.has_room(model, now) for account in picked.values()):
                return []
        if demand.preferred_nodes:
            free = [name for name in sorted(demand.preferred_nodes) if table.is_free(name)]
            self._add_named(picked, self._rng.sample(free, min(len(free), MAX_PREFERRED)), table, usable)
        has_warm_full = False
        tiers_with_free = 0
        for tier in table.tiers:
            if tiers_with_free < 2:  # two tiers, because a lower tier is used if the upper one is much slower
                tiers_with_free += self._add_free(picked, table, tier, usable)
            if not has_warm_full:
                size = len(picked)
                self._add_drawn(picked, table.draw(tier, Bag.WARM_FULL, self._rng), MAX_WARM_FULL, usable)
                has_warm_full = len(picked) > size
        return list(picked.values())

    def _add_free(self, picked: dict[str, NodeAccount], table: NodeTable, tier: int, usable: _UsableCheck) -> bool:
        """Adds nodes of this tier with a free slot: nodes that have the model in memory, and empty nodes. Adds a node
        where the load pushes out another model only if there are no such nodes. Returns whether any node was added."""
        size = len(picked)
        self._add_drawn(picked, table.draw_fastest(tier, self._rng), MAX_WARM_FREE, usable)
        self._add_drawn(picked, table.draw(tier, Bag.EMPTY_FREE, self._rng), MAX_COLD_FREE, usable)
        if len(picked) == size:
            self._add_drawn(picked, table.draw(tier, Bag.COLD_FREE, self._rng), MAX_COLD_FREE, usable)
        return len(picked) > size

    def _add_named(
        self, picked: dict[str, NodeAccount], names: Collection[str], table: NodeTable, usable: _UsableCheck
    ) -> None:
        for name in names:
            if table.is_suitable(name) and usable.allows(self._accounts[name]):
                picked[name] = self._accounts[name]

    @staticmethod
    def _add_drawn(
        picked: dict[str, NodeAccount], drawn: Iterator[NodeAccount], count: int, usable: _UsableCheck
    ) -> None:
        """Adds up to ``count`` usable nodes."""
        for account in drawn:
            if account.name not in picked and usable.allows(account):
                picked[account.name] = account
                count -= 1
                if not count:
                    return

    def note_blocked_nodes(self, demand: Demand, considered: Sequence[Forecast], queue_s: float, now: float) -> bool:
        """Notes the nodes that are blocked: they have a free slot, but their forecast shows that they cannot load the
        model now. Returns whether there is such a node, so that other nodes should be ranked."""
        table = self.table(demand, now)
        if len(table) <= MAX_RANKED_WHOLE:
            return False
        has_blocked = False
        for forecast in considered:
            if not forecast.is_free and table.is_free(forecast.node):
                blocked_s = min(max(forecast.wait_s - queue_s, MIN_BLOCKED_S), MAX_BLOCKED_S)
                table.note_blocked(forecast.node, now + blocked_s)
                has_blocked = True
        return has_blocked


class _UsableCheck:
    """Whether a suitable node may get the request now."""

    __slots__ = ("_exclude", "_model", "_now")

    def __init__(self, demand: Demand, now: float, exclude: Collection[str]) -> None:
        self._exclude = exclude
        self._now = now
        # A request about the model store does not run the model, so it may go to a node where the model is broken.
        self._model = full_name(demand.model) if demand.model is not None and demand.needs_slot else None

    def allows(self, account: NodeAccount) -> bool:
        """Whether the node is not excluded, and neither the node nor the request's model there has an open breaker."""
        if account.name in self._exclude:
            return False
        if not account.is_suspect:  # nearly always
            return True
        if not account.breaker.allows(self._now):
            return False
        return self._model is None or not account.is_broken_for(self._model, self._now)
