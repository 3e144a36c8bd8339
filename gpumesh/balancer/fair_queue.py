"""``FairQueue``: the requests that wait for a slot. It decides which goes next, and who may wait. Pure.

- A higher class goes first. After 16 slots that it took while a lower class waited for them, one slot goes to the lower
  class (``fairness/lane.py``): so a steady stream of chat does not stop a batch for ever.
- Within a class, the client that was served least goes first (``fairness/client_counters.py``).
- Within a client, the request that came first goes first.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, KeysView
from math import isfinite
from typing import Generic, TypeVar

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.client_counters import ClientCounters
from gpumesh.balancer.fairness.lane import RANKS, Lane, QueueEntry, count_grant, next_lane
from gpumesh.balancer.fairness.service_order import service_order
from gpumesh.balancer.fairness.wait_times import WaitTimes

T = TypeVar("T")

# A class may add to the queue while less than this part of it is taken. So a thousand batch requests leave room for
# people: the last three tenths are for normal and interactive requests, the last tenth is for interactive requests
# only.
ROOM = {Priority.INTERACTIVE: 1.0, Priority.NORMAL: 0.9, Priority.BATCH: 0.7}

MAX_WORK = 1e9  # the greatest work of one entry in the sums; a greater forecast is a defect or a lie


class FairQueue(Generic[T]):
    """A queue of requests in classes, groups and clients. ``max_size``: how many may wait.

    Entries of one group can be served by the same nodes. When a slot is free, the caller asks for the ``best`` entry
    among the groups that could use the slot, and takes it; if that entry should rather wait for another node, the
    caller asks again without the entry's group. No operation but ``entries_of``, ``__iter__`` and ``position`` scans
    the queue: the cost grows with the number of groups that are asked for, and with the logarithm of the number of
    entries.

    **Why a single request of a higher class never loses its slot to the share of a lower class.** The count for a lower
    class grows only when a higher class takes a slot that the lower class waited for. It returns to 0 when the lower
    class gets a slot. When no request of the higher class waits, the next free slot goes to the lower class, so no time
    limit is needed. There is one count for each higher class: interactive requests do not pay for slots that normal
    requests took from a batch."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.waits = WaitTimes()  # the caller records the waits
        self.size = 0
        """The number of requests that wait."""
        self._entries: dict[int, QueueEntry[T]] = {}  # by sequence, in the order of arrival
        self._next_sequence = 0
        self._groups: dict[Hashable, dict[Priority, Lane[T]]] = {}  # without empty lanes and groups
        self._counters = {priority: ClientCounters() for priority in Priority}
        # For each client with waiting entries in a class: the lanes that have some of them, by group.
        self._lanes_of_client: dict[tuple[Priority, str], dict[Hashable, Lane[T]]] = {}

    def __repr__(self) -> str:
        return f"<FairQueue {self.size} of {self.max_size} in {len(self._groups)} groups>"

    # -- size and room -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.size

    def __contains__(self, entry: QueueEntry[T]) -> bool:
        return self._entries.get(entry.sequence) is entry

    def size_of(self, group: Hashable) -> int:
        return sum(lane.size for lane in self._groups.get(group, {}).values())

    def entries_of(self, group: Hashable) -> list[QueueEntry[T]]:
        """The entries of this group in the order of their addition. Scans the queue."""
        return [entry for entry in self._entries.values() if entry.group == group]

    def has_room(self, priority: Priority) -> bool:
        """Whether a request of this class may be added. Each class has room for one request in an empty queue, unless
        ``max_size`` is 0."""
        room = max(int(self.max_size * ROOM[priority]), min(self.max_size, 1))
        return self.size < room

    # -- change --------------------------------------------------------------------------------------------------

    def add(
        self,
        payload: T,
        priority: Priority,
        queued_at: float,
        *,
        group: Hashable,
        client: str = "",
        work: float = 0.0,
        tokens: float = 0.0,
        bounded: bool = True,
    ) -> QueueEntry[T]:
        """Adds a request and returns its entry (``QueueEntry`` says what the arguments mean). Raises OverflowError when
        its class has no room, unless ``bounded`` is false: a request that was accepted before is not refused."""
        if bounded and not self.has_room(priority):
            raise OverflowError(f"{self.size} requests wait already, no room for {priority.value} ones")
        work = min(max(work, 0.0), MAX_WORK) if isfinite(work) else 0.0
        entry = QueueEntry(payload, priority, group, client, queued_at, work, tokens, self._next_sequence)
        self._next_sequence += 1
        self._entries[entry.sequence] = entry
        self.size += 1
        lane = self._groups.setdefault(group, {}).get(priority)
        if lane is None:
            lane = self._groups[group][priority] = Lane(RANKS[priority])
        lanes = self._lanes_of_client.get((priority, client))
        if lanes is None:
            lanes = self._lanes_of_client[priority, client] = {}
            least_competitor = lane.head_key[1] if lane.size else None
            counter = self._counters[priority].start_waiting(client, least_competitor)
        else:
            counter = self._counters[priority].of(client)
        if lane.add(entry, counter):
            lanes[group] = lane
        return entry

    def take(self, entry: QueueEntry[T], among: Iterable[Hashable] | None = None) -> None:
        """The entry gets a slot: removes it and charges its client its expected cost.

        ``among`` are the groups that could have had this slot, as they were given to ``best``; ``None``: all groups.
        The shares of lower classes are counted in these groups. Raises KeyError if the entry is not in the queue."""
        if entry not in self:
            raise KeyError(entry)
        counter = self._counters[entry.priority].grant(entry.client, entry.tokens)
        own_lane = self._remove(entry, counter)
        self._refresh_client(entry.priority, entry.client, counter, except_lane=own_lane)
        count_grant(self._lanes(self._groups if among is None else among), RANKS[entry.priority])

    def discard(self, entry: QueueEntry[T]) -> None:
        """Removes the entry without a slot, if it is still in the queue."""
        if entry in self:
            self._remove(entry, self._counters[entry.priority].of(entry.client))

    def _remove(self, entry: QueueEntry[T], counter: float) -> Lane[T]:
        """Removes an entry of a client with this counter. Returns the entry's lane, in which the client is already
        reordered."""
        priority, group, client = entry.priority, entry.group, entry.client
        del self._entries[entry.sequence]
        self.size -= 1
        lanes = self._groups[group]
        lane = lanes[priority]
        if lane.remove(entry, counter):
            lanes_of_client = self._lanes_of_client[priority, client]
            del lanes_of_client[group]
            if not lanes_of_client:
                del self._lanes_of_client[priority, client]
                self._counters[priority].stop_waiting(client)
        if not lane.size:
            del lanes[priority]
            if not lanes:
                del self._groups[group]
        return lane

    # -- what goes next ------------------------------------------------------------------------------------------

    def groups(self) -> KeysView[Hashable]:
        """The groups with waiting requests: a view, which changes with the queue."""
        return self._groups.keys()

    def heads(self, group: Hashable) -> list[QueueEntry[T]]:
        """The request that goes next in each class of this group, the highest class first. Classes without waiting
        requests are left out."""
        lanes = self._groups.get(group, {})
        return [lanes[priority].head for priority in Priority if priority in lanes]

    def best_of_each_class(self, groups: Iterable[Hashable]) -> list[QueueEntry[T]]:
        """The request that goes next in each class among these groups, the highest class first. Classes without waiting
        requests are left out."""
        best: dict[int, Lane[T]] = {}
        for lane in self._lanes(groups):
            known = best.get(lane.rank)
            if known is None or lane.head_key < known.head_key:
                best[lane.rank] = lane
        return [best[rank].head for rank in sorted(best)]

    def best(self, groups: Iterable[Hashable]) -> QueueEntry[T] | None:
        """The entry that goes next among these groups; ``None`` if nothing waits in them. Changes nothing."""
        lanes = self._lanes(groups)
        return next_lane(lanes).head if lanes else None

    def iterate_from(self, head: QueueEntry[T]) -> Iterator[QueueEntry[T]]:
        """The entries of the class and group of ``head``, which must be the first of them: first the entries of its
        client in the order of their arrival, then the entries of the next clients. The queue must not change during the
        iteration. The time of a step does not depend on the length of the queue."""
        return iter(self._groups[head.group][head.priority])

    def _lanes(self, groups: Iterable[Hashable]) -> list[Lane[T]]:
        """The lanes of these groups, none of them empty."""
        all_groups = self._groups
        return [lane for group in groups if group in all_groups for lane in all_groups[group].values()]

    # -- what clients were served --------------------------------------------------------------------------------

    def grant_unqueued(self, priority: Priority, client: str, tokens: float) -> None:
        """A request got a slot without waiting; ``tokens`` is its expected cost in weighted tokens."""
        self._refresh_client(priority, client, self._counters[priority].grant_unqueued(client, tokens))

    def charge(self, priority: Priority, client: str, tokens: float) -> None:
        """Corrects what the client was charged for a request. ``tokens``: the true cost minus the expected cost, in
        weighted tokens. If a request has failed on a node and is added again, it is minus the expected cost."""
        self._refresh_client(priority, client, self._counters[priority].charge(client, tokens))

    def _refresh_client(
        self, priority: Priority, client: str, counter: float, *, except_lane: Lane[T] | None = None
    ) -> None:
        """Reorders the client in all lanes in which it waits, except in ``except_lane``."""
        for lane in self._lanes_of_client.get((priority, client), {}).values():
            if lane is not except_lane:
                lane.reorder_client(client, counter)

    # -- work that waits -----------------------------------------------------------------------------------------

    def work_before(self, group: Hashable, priority: Priority) -> float:
        """The work of the waiting entries of this group in this class and in higher classes, in the caller's unit. A
        new request of this class waits for at most this work (the small shares of lower classes are left out)."""
        lanes = self._groups.get(group, {})
        return sum(max(lane.work, 0.0) for lane in lanes.values() if lane.rank <= RANKS[priority])

    # -- the order, for people -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[QueueEntry[T]]:
        """The entries in the order in which they get slots, as ``service_order`` forecasts it. The queue must not
        change during the iteration."""
        classes = []
        for priority in Priority:
            lanes = [lanes[priority] for lanes in self._groups.values() if priority in lanes]
            classes.append((lanes, self._counters[priority]))
        return service_order(classes)

    def position(self, entry: QueueEntry[T]) -> int:
        """The number of requests that are served before this one. Raises ValueError if it is not in the queue."""
        for position, other in enumerate(self):
            if other is entry:
                return position
        raise ValueError("the entry is not in the queue")
