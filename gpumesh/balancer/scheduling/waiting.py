"""What waits in the queue: ``Waiting``, and its ``Group``, which decides which nodes can serve it. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.policies.base import Choice
from gpumesh.balancer.select import suits_demand
from gpumesh.balancer.work import Work
from gpumesh.text.model_names import full_name
from gpumesh.topology import BackendKind


class Group(NamedTuple):
    """What decides which nodes can serve a waiting request. Requests of one group differ only in their order."""

    model: str | None
    residency: ResidencyKey | None
    kinds: frozenset[BackendKind]
    node: str | None
    nodes: frozenset[str] | None
    exclude: frozenset[str]


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue, where it came at ``joined_at``. ``payload`` is the owner's own object.

    - ``offered_at``: the first time at which it could have had a free slot, but had to wait for a better node;
    ``None``:
      it had no such offer yet.
    - ``patience_until``: until this time it waits for a better node although another node has a free slot; ``None``: no
      other node had a free slot.
    - ``passes``: how many times a free slot went to a request behind it in the queue.
    - ``work``: its work; ``None``: not estimated yet. ``best_s``: the seconds that it takes on the node where it costs
      least. Both were estimated at ``estimated_at``.
    """

    demand: Demand
    exclude: frozenset[str]
    payload: object
    joined_at: float
    offered_at: float | None = None
    patience_until: float | None = None
    passes: int = 0
    work: Work | None = None
    best_s: float = 0.0
    estimated_at: float = 0.0


class Refused(NamedTuple):
    """A new request that was not placed at once. ``original_demand`` is the caller's own object, by which ``wait``
    recognizes the request. ``demand`` is the same with its residency key. ``choice`` is the answer of the policy."""

    original_demand: Demand
    demand: Demand
    work: Work
    choice: Choice


class Patience:
    """How long requests wait for a better node although another has a free slot. Times are seconds of the caller's
    clock."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int, QueueEntry[Waiting]]] = []  # a heap
        self._count = 0  # so that no two members of the heap are equal

    def __repr__(self) -> str:
        return f"<Patience {len(self._ends)} times>"

    def begin(self, entry: QueueEntry[Waiting], patience_s: float, now: float) -> None:
        """Lets the request wait ``patience_s`` from now for a better node."""
        waiting = entry.payload
        if waiting.offered_at is None:
            waiting.offered_at = now
        until = waiting.patience_until = now + patience_s
        self._count += 1
        heapq.heappush(self._ends, (until, self._count, entry))

    def next_end(self, queue: FairQueue[Waiting]) -> float | None:
        """The next time at which a patience ends in a group that still waits; ``None``: there is none."""
        while self._ends and not queue.size_of(self._ends[0][2].group):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def take_ended(self, now: float) -> Iterator[QueueEntry[Waiting]]:
        """Removes and yields the requests whose patience is over."""
        while self._ends and self._ends[0][0] <= now:
            yield heapq.heappop(self._ends)[2]

    def clear(self) -> None:
        self._ends.clear()


class Pauses:
    """The nodes whose breakers have opened. The end of such a pause is no event."""

    def __init__(self) -> None:
        self._accounts: dict[str, NodeAccount] = {}  # by the name of the node

    def __repr__(self) -> str:
        return f"<Pauses of {', '.join(self._accounts) or 'no node'}>"

    def begin(self, account: NodeAccount) -> None:
        """The node's breaker has opened."""
        self._accounts[account.name] = account

    def end(self, name: str) -> None:
        """Forgets a node that was removed."""
        self._accounts.pop(name, None)

    def ends(self) -> list[float]:
        """The times at which the pauses end."""
        times = (account.breaker.open_until for account in self._accounts.values())
        return [until for until in times if until is not None]

    def take_ended(self, now: float) -> list[NodeAccount]:
        """Removes and returns the nodes whose breakers are half-open now, or closed: they may be asked."""
        if not self._accounts:  # nearly always
            return []
        accounts = list(self._accounts.values())
        ended = [node for node in accounts if node.breaker.open_until is None or node.breaker.open_until <= now]
        for account in ended:
            del self._accounts[account.name]
        return ended


def group_of(demand: Demand, exclude: frozenset[str]) -> Group:
    return Group(demand.model, demand.residency, demand.kinds, demand.node, demand.nodes, exclude)


def can_serve(account: NodeAccount, group: Group, now: float) -> bool:
    """Whether the node has a free slot for the requests of this group."""
    model = None if group.residency is None else group.residency.model
    return account.has_room(model, now) and could_serve(account, group, now)


def could_serve(account: NodeAccount, group: Group, now: float) -> bool:
    """Whether the node could serve the requests of this group if it had a free slot."""
    if account.name in group.exclude or not suits_demand(account, group):
        return False
    if group.model is None or not account.model_breakers.faults:  # nearly always
        return True
    return not account.is_broken_for(full_name(group.model), now)


def with_residency(demand: Demand) -> Demand:
    """The demand with a residency key. A demand without a key needs its model with the server's default settings."""
    if demand.residency is not None or demand.model is None:
        return demand
    return replace(demand, residency=ResidencyKey(full_name(demand.model)))


def demand_of(group: Group) -> Demand:
    """A demand that stands for the requests of this group: the same nodes can serve it, and also the excluded nodes."""
    return Demand(model=group.model, kinds=group.kinds, node=group.node, nodes=group.nodes)
