"""``Lane``: the waiting requests of one class and one group, the next one of the least served client first."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from math import inf
from operator import attrgetter
from typing import Generic, TypeVar

import msgspec

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.sorted_items import SortedItems

T = TypeVar("T")

RANKS = {priority: rank for rank, priority in enumerate(Priority)}  # 0: the highest class

# So many slots go to a higher class before one goes to a lower class that waits for them. A lower class then has 1/17
# of a busy mesh: enough that nothing waits for ever, and little enough that a chat does not feel it.
GRANTS_BEFORE_SHARE = 16


class QueueEntry(msgspec.Struct, Generic[T], frozen=True, eq=False):
    """A request in the queue. ``payload`` is the caller's own object for it.

    ``group`` decides which nodes can serve the request: entries with equal groups can be served by the same nodes.
    ``queued_at`` may lie before the addition: a request that has failed on a node keeps its place before the later
    requests of its client. ``work`` is what it adds to the forecast of waits, in the caller's unit; ``tokens`` is its
    expected cost in weighted tokens, for fairness. ``sequence`` is its number in the order of additions."""

    payload: T
    priority: Priority
    group: Hashable
    client: str
    queued_at: float
    work: float
    tokens: float
    sequence: int


class Lane(Generic[T]):
    """The waiting requests of one class and one group: for each client in the order of arrival, and the clients by
    their counters, the least first; equal counters by the arrival of the clients' first requests.

    ``head`` is the entry that goes next; only an empty lane has none, and nobody keeps such a lane. ``head_key`` is its
    place among the heads of all lanes, the least first: the rank of its class, its client's counter, its arrival, its
    sequence. ``skipped_by[rank]`` counts the slots that classes of this rank or a higher one took although a request of
    this lane could have had them, since the last such slot that went to this lane's class."""

    __slots__ = (
        "_borrowed",
        "_clients",
        "_head_client",
        "_order",
        "head",
        "head_key",
        "rank",
        "size",
        "skipped_by",
        "work",
    )

    head: QueueEntry[T]

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.size = 0
        self.work = 0.0  # of all its entries
        self.skipped_by = [0] * rank
        self.head_key: tuple[float, float, float, int] = (inf, inf, inf, 0)  # the key of an empty lane
        self._head_client = ""
        # By name; each client's entries in the order of arrival.
        self._clients: dict[str, SortedItems[tuple[float, int], QueueEntry[T]]] = {}
        self._order: SortedItems[tuple[float, float, float, int], str] = SortedItems()
        self._borrowed: set[str] = set()  # clients whose entries are shared with another lane: copied before a change

    @classmethod
    def merge(cls, lanes: Iterable[Lane[T]], counter_of: Callable[[str], float]) -> Lane[T]:
        """A new lane with the entries of these lanes, which are of one class. It shares their lists of entries instead
        of copying them, so it may only be used until one of these lanes changes. ``counter_of`` gives a client's
        counter."""
        lanes = list(lanes)
        merged: Lane[T] = cls(lanes[0].rank)
        for lane in lanes:
            merged.size += lane.size
            merged.skipped_by = [max(counts) for counts in zip(merged.skipped_by, lane.skipped_by, strict=True)]
            for client, requests in lane._clients.items():
                other = merged._clients.get(client)
                merged._clients[client] = requests if other is None else SortedItems(other.pairs() + requests.pairs())
        merged._borrowed = set(merged._clients)
        merged._order = SortedItems(
            ((merged.rank, counter_of(client), *requests.first()[0]), client)
            for client, requests in merged._clients.items()
        )
        merged._find_head()
        return merged

    def add(self, entry: QueueEntry[T], counter: float) -> bool:
        """Adds an entry of a client with this counter. Returns whether the client had no entry in this lane."""
        self.size += 1
        self.work += entry.work
        client = entry.client
        requests = self._clients.get(client)
        is_new_client = requests is None
        if requests is None:
            requests = self._clients[client] = SortedItems()
        requests.put(entry, (entry.queued_at, entry.sequence))
        if requests.first()[1] is entry:
            self.reorder_client(client, counter)
        return is_new_client

    def remove(self, entry: QueueEntry[T], counter: float) -> bool:
        """Removes an entry of a client with this counter. Returns whether the client has no other entry in the lane."""
        self.size -= 1
        self.work -= entry.work
        client = entry.client
        requests = self._clients[client]
        if client in self._borrowed:
            self._borrowed.discard(client)
            requests = self._clients[client] = SortedItems(requests.pairs())
        was_first = requests.first()[1] is entry
        requests.remove(entry)
        if not requests:
            del self._clients[client]
            self._order.remove(client)
            if self.size:
                self._find_head()
            return True
        if was_first:
            self.reorder_client(client, counter)
        return False

    def __iter__(self) -> Iterator[QueueEntry[T]]:
        """The entries in their order: those of the client that is next, then those of the others. The lane must not
        change during the iteration."""
        for client in self._order:
            yield from self._clients[client]

    def reorder_client(self, client: str, counter: float) -> None:
        """Moves a client to its right place in the order, because its counter or its first entry has changed. The
        client must have an entry in this lane. ``counter`` is its counter now."""
        queued_at, sequence = self._clients[client].first()[0]
        key = (self.rank, counter, queued_at, sequence)
        self._order.put(client, key)
        if client == self._head_client or key < self.head_key:
            self._find_head()

    def _find_head(self) -> None:
        self.head_key, self._head_client = self._order.first()
        self.head = self._clients[self._head_client].first()[1]


def next_lane(lanes: list[Lane[T]]) -> Lane[T]:
    """The lane among these whose head goes next. Raises ValueError if there is no lane.

    A class has earned its share if it has earned it in one of these lanes. Any of its lanes may then get the slot, so
    that the order among its clients stays the same."""
    first = min(lanes, key=_head_key)
    rank = first.rank
    with_share = [lane.rank for lane in lanes if lane.rank > rank and lane.skipped_by[rank] >= GRANTS_BEFORE_SHARE]
    if not with_share:
        return first
    share_rank = min(with_share)
    return min((lane for lane in lanes if lane.rank == share_rank), key=_head_key)


def count_grant(lanes: list[Lane[T]], rank: int) -> None:
    """A class of this rank got a slot that the heads of all these lanes could have had."""
    for lane in lanes:
        if lane.rank > rank:
            for higher_rank in range(rank, lane.rank):
                lane.skipped_by[higher_rank] += 1
        elif rank and lane.rank == rank:  # the highest class has no counts
            lane.skipped_by = [0] * rank


_head_key = attrgetter("head_key")
