"""The slots of a loaded model, each with the cache of the last text that it worked on, as llama-server has them.

A request takes the idle slot whose cached text has the longest prefix in common with its prompt, if that is more than a
tenth of the prompt. Otherwise it takes the slot that was used longest ago. It computes only what is new to this slot.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

MIN_SIMILARITY = 0.1
"""``--slot-prompt-similarity`` of llama-server: the share of the prompt that must be in a slot's cache."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot. ``text`` is the text whose tokens are in its cache: a prompt and its answer.

    ``used`` is a number that grows with each use of any slot.
    """

    text: str = ""
    used: int = 0
    busy: bool = False


class SlotPool:
    """The slots of one loaded model. Requests past them wait, first come, first served.

    ``shared_cache``: what any slot has cached helps all (vLLM). Otherwise a slot has only its own text (llama-server).
    """

    def __init__(self, count: int, *, shared_cache: bool = False) -> None:
        self._slots = [Slot() for _ in range(count)]
        self._places = asyncio.Semaphore(count)
        self._shared_cache = shared_cache
        self._uses = itertools.count(1)

    async def acquire(self) -> None:
        """Waits for a place. Its holder may call ``take_slot`` once, and calls ``release``."""
        await self._places.acquire()

    def take_slot(self, prompt: str) -> tuple[Slot, int]:
        """Takes the idle slot that fits best. Returns it with the number of the prompt's characters in the cache.

        The caller holds a place, so there is an idle slot.
        """
        idle = [slot for slot in self._slots if not slot.busy]
        common = {id(slot): common_prefix_length(slot.text, prompt) for slot in self._slots}
        slot = max(idle, key=lambda slot: common[id(slot)])
        if common[id(slot)] <= MIN_SIMILARITY * len(prompt):
            slot = min(idle, key=lambda slot: slot.used)
        slot.busy = True
        slot.used = next(self._uses)
        return slot, max(common.values()) if self._shared_cache else common[id(slot)]

    def release(self, slot: Slot | None) -> None:
        """Gives a place back, with its slot if one was taken."""
        if slot is not None:
            slot.busy = False
            slot.used = next(self._uses)
        self._places.release()


def common_prefix_length(first: str, second: str) -> int:
    """The number of characters that both texts begin with. A binary search, because prompts may be long."""
    equal, limit = 0, min(len(first), len(second))  # the first ``equal`` characters are the same
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal
