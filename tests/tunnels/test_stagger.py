"""The intervals of many nodes are spread over time."""

from __future__ import annotations

from itertools import islice

from gpumesh.tunnels.stagger import stagger_intervals


def test_a_hundred_nodes_are_spread_over_the_interval() -> None:
    """No tenth of the interval has more than a fifth of the nodes."""
    second = [next(stagger_intervals(f"node-{number:03d}", 2.0)) for number in range(100)]
    tenths = [int((wait - 1.0) / 0.2) for wait in second]
    assert set(tenths) == set(range(10))
    assert max(tenths.count(tenth) for tenth in range(10)) <= 20


def test_later_intervals_are_equal() -> None:
    first, *others = islice(stagger_intervals("iceland", 2.0), 5)
    assert 1.0 <= first < 3.0
    assert others == [2.0] * 4
    assert next(stagger_intervals("iceland", 2.0)) == first, "a node always has the same interval"
