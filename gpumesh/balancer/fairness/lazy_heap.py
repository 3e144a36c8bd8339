"""``LazyHeap``: a heap whose items can be removed or get another key at any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound="tuple[float, ...]")
ItemT = TypeVar("ItemT")

# The list is rebuilt when it has more than twice as many pairs as there are items, plus these. With few items the front
# of the list is cleaned soon anyway.
SPARE_PAIRS = 16


class LazyHeap(Generic[KeyT, ItemT]):
    """Hashable items, each with a key; the item with the least key is the first. No two items have equal keys.

    A removed item's pair stays in the list. It is dropped when it comes to the front, or when the list is rebuilt
    because most pairs are outdated. So each operation takes O(log n) on average."""

    __slots__ = ("_current", "_heap")

    def __init__(self, pairs: Iterable[tuple[KeyT, ItemT]] = ()) -> None:
        """``pairs``: the first keys and items."""
        self._heap = list(pairs)
        heapify(self._heap)
        self._current = {pair[1]: pair for pair in self._heap}  # the pairs of the list that are not outdated

    def __len__(self) -> int:
        return len(self._current)

    def put(self, item: ItemT, key: KeyT) -> None:
        """Adds the item, or gives it another key."""
        current = self._current.get(item)
        if current is not None and current[0] == key:
            return
        pair = self._current[item] = (key, item)
        heappush(self._heap, pair)
        if len(self._heap) > 2 * len(self._current) + SPARE_PAIRS:
            self._drop_outdated()

    def remove(self, item: ItemT) -> None:
        """Removes the item. Raises KeyError if it is not there."""
        del self._current[item]
        if len(self._heap) > 2 * len(self._current) + SPARE_PAIRS:
            self._drop_outdated()

    def first(self) -> tuple[KeyT, ItemT]:
        """The least key and its item. Raises IndexError if there is no item."""
        heap, current = self._heap, self._current
        while True:
            pair = heap[0]
            if current.get(pair[1]) is pair:
                return pair
            heappop(heap)

    def __iter__(self) -> Iterator[ItemT]:
        """The items by their keys, the least first. The heap must not change during the iteration. Each step takes
        O(log n) of the items that were yielded, and some time for outdated pairs between them."""
        heap, current = self._heap, self._current
        frontier: list[tuple[KeyT, int]] = [(heap[0][0], 0)] if heap else []  # keys and places: no item before them
        while frontier:
            _, index = heappop(frontier)
            pair = heap[index]
            if current.get(pair[1]) is pair:
                yield pair[1]
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child][0], child))

    def pairs(self) -> list[tuple[KeyT, ItemT]]:
        """All keys and items, in no order."""
        return list(self._current.values())

    def _drop_outdated(self) -> None:
        self._heap = self.pairs()
        heapify(self._heap)
