"""Forecasts the order in which waiting requests will get slots, to show it to people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from gpumesh.balancer.fairness.client_counters import ClientCounters
from gpumesh.balancer.fairness.lane import Lane, QueueEntry, count_grant, next_lane

T = TypeVar("T")


def service_order(classes: Sequence[tuple[list[Lane[T]], ClientCounters]]) -> Iterator[QueueEntry[T]]:
    """The entries of these lanes in the order in which they get slots, if each slot suits all groups, each request
    costs what is expected, and no other request comes. ``classes``: the lanes and the counters of each class, from the
    highest class down. They are not changed, and must not change during the iteration."""
    counters_by_rank = [counters.copy() for _, counters in classes]
    merged = [Lane.merge(lanes, counters.of) for lanes, counters in classes if lanes]
    while merged:
        lane = next_lane(merged)
        entry = lane.head
        counter = counters_by_rank[lane.rank].grant(entry.client, entry.tokens)
        lane.remove(entry, counter)
        count_grant(merged, lane.rank)
        if not lane.size:
            merged.remove(lane)
        yield entry
