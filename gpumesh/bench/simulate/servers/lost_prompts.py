"""llama-server's cache in the host's memory (``--cache-ram``): the prompts that its slots have lost. Pure.

If a slot is about to lose more than half of its content, the content is kept here. A kept prompt returns into a slot
for a request that begins like it, and is then only in that slot.
"""

from __future__ import annotations

from gpumesh.bench.simulate.servers.blocks import begins_with, common_blocks

MAX_LOSS = 0.5  # of a slot's content: if it would lose a larger share, the content is kept
MIN_KEPT = 0.25  # a prompt returns only if the request has at least this share of it, because the rest would be lost


class LostPrompts:
    """Prompts as the ids of their blocks, the oldest first: at most ``capacity`` blocks. (The latest prompt alone may
    be longer.)"""

    __slots__ = ("_capacity", "_prompts", "_size")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._prompts: list[tuple[int, ...]] = []
        self._size = 0  # the blocks of all prompts

    def __repr__(self) -> str:
        return f"<LostPrompts {len(self._prompts)} with {self._size} of {self._capacity} blocks>"

    def add(self, blocks: tuple[int, ...]) -> None:
        """Keeps a prompt that a slot loses. If one kept prompt begins with another, only the longer prompt is kept."""
        if not blocks or any(begins_with(kept, blocks) for kept in self._prompts):
            return
        self._prompts = [kept for kept in self._prompts if not begins_with(blocks, kept)]
        self._prompts.append(blocks)
        self._size = sum(map(len, self._prompts))
        while len(self._prompts) > 1 and self._size > self._capacity:
            self._size -= len(self._prompts.pop(0))

    def take_better(self, in_slot: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
        """The prompt that the slot should hold for a request with these blocks: the prompt ``in_slot``, or a better
        kept prompt, which is then removed from here.

        A kept prompt is better if it has more blocks of the request, and if the request has a larger share of it."""
        best = self.find_better(in_slot, blocks)
        if best is not in_slot:
            self._prompts.remove(best)
            self._size -= len(best)
        return best

    def find_better(self, in_slot: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
        """As ``take_better``, but does not remove the prompt."""
        best, best_count = in_slot, common_blocks(in_slot, blocks)
        best_share = best_count / len(in_slot) if in_slot else -1.0
        for kept in self._prompts:
            count = common_blocks(kept, blocks)
            share = count / len(kept)
            if share >= MIN_KEPT and share > best_share and count > best_count:
                best, best_count, best_share = kept, count, share
        return best
