"""The slots of a loaded model, each with the cache of the last text that it worked on, as llama-server has them.

A request takes the idle slot whose cached text has the longest prefix in common with its prompt, if that is more than a
tenth of the prompt. Otherwise it takes the slot that was used longest ago. It computes only the tokens that are not in
this slot's cache. A text that a slot loses may be kept in the host's memory, and brought back into any slot
(prefixes.py).
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from gpumesh.lab.inference.prefixes import LostTexts, common_prefix_length

MIN_SIMILARITY = 0.1
"""``--slot-prompt-similarity`` of llama-server: the share of the prompt that must be in a slot's cache."""

MAX_LOSS = 0.5
"""If a slot is to lose more than this share of its text, the text is first saved in the host's memory."""


@dataclass(slots=True, eq=False)
class Slot:
    """One slot. ``text`` is the text whose tokens are in its cache: a prompt and its answer.

    ``used`` is a number that grows with each use of any slot.
    """

    text: str = ""
    used: int = 0
    busy: bool = False


class SlotPool:
    """The slots of one loaded model. If all are taken, requests wait: first come, first served.

    ``shared_cache``: every slot can use the cached texts of all (vLLM). Otherwise a slot can use only its own cached
    text (llama-server). ``lost_tokens``: how many tokens of lost texts are kept.
    """

    def __init__(self, count: int, *, shared_cache: bool = False, lost_tokens: int = 0) -> None:
        self._slots = [Slot() for _ in range(count)]
        self._free_slots = asyncio.Semaphore(count)
        self._shared_cache = shared_cache
        self._lost_texts = LostTexts(lost_tokens)
        self._uses = itertools.count(1)

    async def acquire(self) -> None:
        """Waits until a slot is free, and reserves one. The caller may call ``take_slot`` once; it must ``release``."""
        await self._free_slots.acquire()

    def take_slot(self, prompt: str) -> tuple[Slot, int]:
        """Takes the idle slot that fits best. Returns it with the number of the prompt's characters in the cache.

        The caller has called ``acquire``, so there is an idle slot.
        """
        idle = [slot for slot in self._slots if not slot.busy]
        slot = max(idle, key=lambda slot: common_prefix_length(slot.text, prompt))
        common_length = common_prefix_length(slot.text, prompt)
        is_similar = common_length > MIN_SIMILARITY * len(prompt)
        if not is_similar:
            slot = min(idle, key=lambda slot: slot.used)
        loses_much = common_length < (1 - MAX_LOSS) * len(slot.text)
        if not is_similar or loses_much:
            self._lost_texts.save(slot.text)
            slot.text = self._lost_texts.take_better(slot.text, prompt)
        slot.busy = True
        slot.used = next(self._uses)
        sources = self._slots if self._shared_cache else [slot]
        return slot, max(common_prefix_length(source.text, prompt) for source in sources)

    def release(self, slot: Slot | None) -> None:
        """Gives back the slot that ``acquire`` reserved. ``slot`` is the result of ``take_slot``; ``None`` if
        ``take_slot`` was not called."""
        if slot is not None:
            slot.busy = False
            slot.used = next(self._uses)
        self._free_slots.release()
