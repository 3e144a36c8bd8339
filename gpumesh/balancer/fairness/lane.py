"""``Lane``: the waiting requests of one class and one group, the next one of the least served client first."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.lazy_heap import LazyHeap

T = TypeVar("T")

RANKS = {priority: rank for rank, priority in enumerate(Priority)}  # 0: the highest class


@dataclass(frozen=True, slots=True, eq=False)
class QueueEntry(Generic[T]):
    """A request in the queue. ``payload`` is the caller's own object for it.

    ``group`` decides which nodes can serve the request: entries with equal groups can be served by the same nodes.
    ``queued_at`` may lie before the addition: a request that a node failed keeps its place before the later ones of its
    client. ``work`` is what it adds to the forecast of waits, in the caller's unit; ``tokens`` is its expected cost in
    weighted tokens, for fairness. ``sequence`` is its number in the order of additions."""

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

    ``skipped_by[rank]`` counts the slots that went to classes of this rank or a higher class while a request of this
    lane waited that could have had the slot, since the last slot that went to this lane's class instead."""

    __slots__ = ("_clients", "_order", "rank", "size", "skipped_by", "work")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.size = 0
        self.work = 0.0
        self.skipped_by = [0] * rank
        self._clients: dict[str, LazyHeap[tuple[float, int], QueueEntry[T]]] = {}
        self._order: LazyHeap[tuple[float, float, int], str] = LazyHeap()

    def add(self, entry: QueueEntry[T], counter: float) -> bool:
        """Adds an entry of a client with this counter. Returns whether the client had no entry in this lane."""
        requests = self._clients.get(entry.client)
        is_new_client = requests is None
        if requests is None:
            requests = self._clients[entry.client] = LazyHeap()
        requests.put(entry, (entry.queued_at, entry.sequence))
        self.size += 1
        self.work += entry.work
        if requests.first()[1] is entry:
            self._order.put(entry.client, (counter, entry.queued_at, entry.sequence))
        return is_new_client

    def remove(self, entry: QueueEntry[T]) -> bool:
        """Removes an entry. Returns whether its client has no other entry in this lane. Otherwise the caller must call
        ``set_counter``, because the client may have another first entry now."""
        requests = self._clients[entry.client]
        requests.remove(entry)
        self.size -= 1
        self.work -= entry.work
        if not requests:
            del self._clients[entry.client]
            self._order.remove(entry.client)
            return True
        return False

    def set_counter(self, client: str, counter: float) -> None:
        """The client, which has an entry in this lane, has another counter or another first entry now."""
        queued_at, sequence = self._clients[client].first()[0]
        self._order.put(client, (counter, queued_at, sequence))

    @property
    def head(self) -> QueueEntry[T]:
        """The entry that goes next in this lane. Raises IndexError if there is none."""
        return self._clients[self._order.first()[1]].first()[1]

    @property
    def head_key(self) -> tuple[float, float, int]:
        """The order among the heads of lanes of one class, the least first: the client's counter, the time of arrival,
        the sequence. Raises IndexError if there is none."""
        return self._order.first()[0]

    def copy(self) -> Lane[T]:
        copy: Lane[T] = Lane(self.rank)
        copy.size, copy.work = self.size, self.work
        copy.skipped_by = self.skipped_by.copy()
        copy._clients = {client: requests.copy() for client, requests in self._clients.items()}
        copy._order = self._order.copy()
        return copy

    @property
    def clients(self) -> list[str]:
        return list(self._clients)
