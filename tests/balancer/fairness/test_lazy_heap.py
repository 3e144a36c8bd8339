from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.fairness.lazy_heap import SPARE_PAIRS, LazyHeap


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 50) | st.none()), max_size=200))
def test_the_first_item_has_the_least_key_and_the_list_stays_short(steps: list[tuple[int, int | None]]) -> None:
    """A step gives an item a key, or removes the item (``None``)."""
    heap: LazyHeap[tuple[float, ...], int] = LazyHeap()
    expected: dict[int, tuple[float, ...]] = {}
    for item, key in steps:
        if key is not None:
            expected[item] = (key, item)
            heap.put(item, (key, item))
        elif item in expected:
            del expected[item]
            heap.remove(item)
        assert len(heap) == len(expected)
        assert sorted(heap.pairs()) == sorted((key, item) for item, key in expected.items())
        if expected:
            least = min(expected, key=expected.__getitem__)
            assert heap.first() == (expected[least], least)
        assert len(heap._heap) <= 2 * len(expected) + SPARE_PAIRS


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50) | st.none()), max_size=100))
def test_an_iteration_yields_the_items_by_their_keys(steps: list[tuple[int, int | None]]) -> None:
    heap: LazyHeap[tuple[float, ...], int] = LazyHeap()
    expected: dict[int, tuple[float, ...]] = {}
    for item, key in steps:
        if key is not None:
            expected[item] = (key, item)
            heap.put(item, (key, item))
        elif item in expected:
            del expected[item]
            heap.remove(item)
    assert list(heap) == sorted(expected, key=expected.__getitem__)
    assert sorted(heap.pairs()) == sorted((key, item) for item, key in expected.items())
