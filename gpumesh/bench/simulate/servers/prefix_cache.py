"""A cache of the blocks of prompts. The least recently used block is dropped first; within a prompt, the last block.
Pure."""

from __future__ import annotations

from collections import OrderedDict


class PrefixCache:
    """Holds at most ``capacity`` blocks, by their ids. An id stands for all the text of a prompt up to the end of its
    block, so a block is useful only together with all blocks before it.

    vLLM and SGLang keep the blocks of all prompts like this; llama.cpp's ``--cache-ram`` and LMCache come near to it.
    """

    __slots__ = ("_blocks", "_capacity")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self._blocks)} of {self._capacity} blocks>"

    def count(self, blocks: tuple[int, ...]) -> int:
        """The number of blocks, from the first on, that the cache holds.

        ``add`` uses the blocks of a prompt in such an order that a later block leaves the cache before an earlier
        block. So the cache always holds a beginning of the prompt, and bisection finds the end of this beginning.
        """
        low, high = 0, len(blocks)
        held = self._blocks
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def add(self, blocks: tuple[int, ...]) -> None:
        """Puts all blocks of a prompt into the cache, or marks them as used."""
        held = self._blocks
        for block in reversed(blocks):  # so that the first block is the most recently used
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._capacity:
            held.popitem(last=False)
