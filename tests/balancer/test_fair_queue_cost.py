"""The cost of a decision does not grow with the number of requests that wait. Counted in calls, not in time: a busy
machine would make times useless."""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random
from statistics import mean

import pytest

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fair_queue import FairQueue


def calls_of(action: Callable[[], object]) -> int:
    """The number of calls, of Python's functions and of C's, that the action makes."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(count_call)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return count


def mean_calls(waiting: int, clients: int) -> dict[str, float]:
    """The mean calls of each operation while so many requests of so many clients wait in four groups."""
    rng = Random(1)
    queue: FairQueue[int] = FairQueue(waiting + 1)

    def add_request() -> None:
        cost = rng.uniform(100, 3000)
        client = f"client {rng.randrange(clients)}"
        queue.add(0, rng.choice(list(Priority)), 0.0, group=rng.randrange(4), client=client, tokens=cost, bounded=False)

    def take_best() -> None:
        entry = queue.best(queue.groups())
        assert entry is not None
        queue.take(entry)

    for _ in range(waiting):
        add_request()
    calls: dict[str, list[int]] = {"add": [], "take": [], "discard": []}
    for _ in range(100):
        calls["add"].append(calls_of(add_request))
        calls["take"].append(calls_of(take_best))
        add_request()
        entry = rng.choice(queue.heads(rng.choice(list(queue.groups()))))
        calls["discard"].append(calls_of(lambda entry=entry: queue.discard(entry)))  # type: ignore[misc]
    return {operation: mean(counts) for operation, counts in calls.items()}


@pytest.mark.parametrize("clients", [1, 50, 10_000])
def test_a_hundred_times_as_many_requests_cost_hardly_more(clients: int) -> None:
    few, many = mean_calls(100, clients), mean_calls(10_000, clients)
    for operation, calls in many.items():
        assert calls < 2 * few[operation] + 20, operation
