from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.fairness.sorted_items import SortedItems

Steps = list[tuple[int, int | None]]
"""Each step gives an item a key, or removes the item (``None``)."""
Keys = dict[int, tuple[float, ...]]


def apply(steps: Steps) -> Iterator[tuple[SortedItems[tuple[float, ...], int], Keys]]:
    """The items after each step, and the keys that they should have; at first there is no item."""
    items: SortedItems[tuple[float, ...], int] = SortedItems()
    expected: Keys = {}
    yield items, expected
    for item, key in steps:
        if key is not None:
            expected[item] = (key, item)
            items.put(item, (key, item))
        elif item in expected:
            del expected[item]
            items.remove(item)
        yield items, expected


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 50) | st.none()), max_size=200))
def test_the_first_item_has_the_least_key(steps: Steps) -> None:
    for items, expected in apply(steps):
        assert len(items) == len(expected)
        assert sorted(items.pairs()) == sorted((key, item) for item, key in expected.items())
        if expected:
            least = min(expected, key=expected.__getitem__)
            assert items.first() == (expected[least], least)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50) | st.none()), max_size=100))
def test_an_iteration_yields_the_items_by_their_keys(steps: Steps) -> None:
    *_, (items, expected) = apply(steps)
    assert list(items) == sorted(expected, key=expected.__getitem__)
    assert sorted(items.pairs()) == sorted((key, item) for item, key in expected.items())
