from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.fairness.sorted_items import SortedItems


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 50) | st.none()), max_size=200))
def test_the_first_item_has_the_least_key(steps: list[tuple[int, int | None]]) -> None:
    """A step gives an item a key, or removes the item (``None``)."""
    items: SortedItems[tuple[float, ...], int] = SortedItems()
    expected: dict[int, tuple[float, ...]] = {}
    for item, key in steps:
        if key is not None:
            expected[item] = (key, item)
            items.put(item, (key, item))
        elif item in expected:
            del expected[item]
            items.remove(item)
        assert len(items) == len(expected)
        assert sorted(items.pairs()) == sorted((key, item) for item, key in expected.items())
        if expected:
            least = min(expected, key=expected.__getitem__)
            assert items.first() == (expected[least], least)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50) | st.none()), max_size=100))
def test_an_iteration_yields_the_items_by_their_keys(steps: list[tuple[int, int | None]]) -> None:
    items: SortedItems[tuple[float, ...], int] = SortedItems()
    expected: dict[int, tuple[float, ...]] = {}
    for item, key in steps:
        if key is not None:
            expected[item] = (key, item)
            items.put(item, (key, item))
        elif item in expected:
            del expected[item]
            items.remove(item)
    assert list(items) == sorted(expected, key=expected.__getitem__)
    assert sorted(items.pairs()) == sorted((key, item) for item, key in expected.items())
