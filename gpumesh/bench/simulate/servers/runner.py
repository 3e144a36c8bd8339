"""A model in a simulated server's memory: its slots, each with the prompt that it read last, and who waits for a slot.

As llama.cpp's server does it: a request takes the free slot whose content begins like its prompt; if none has a large
part of the prompt, the slot that was used longest ago. A slot that is in use cannot be shared. Besides, a server may
have a cache of prompts that all slots share (``cache_tokens``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from gpumesh.bench.simulate.fleet import ModelSpec
from gpumesh.bench.simulate.requests import Attempt, SimulatedRequest
from gpumesh.bench.simulate.servers.prefix_cache import PrefixCache

# llama.cpp's --slot-prompt-similarity: a slot is chosen for its content if it holds more than this share of the prompt.
MIN_SIMILARITY = 0.1


class Slot:
    """A slot of a runner. ``blocks`` are the ids of the blocks of tokens that its cache holds."""

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: tuple[int, ...] = ()


class Runner:
    """A model that is loaded, or is being loaded, for one context length.

    ``users`` counts the attempts that run or wait here. ``is_ready``: the load has ended. ``is_expiring``: it is
    unloaded as soon as it has no users. ``last_used_at``: when the last attempt ended or came. ``cache_tokens``: the
    size of the shared cache; 0: there is none.
    """

    __slots__ = (
        "_cache",
        "_cache_tokens",
        "context",
        "free_slots",
        "is_expiring",
        "is_ready",
        "last_used_at",
        "spec",
        "users",
        "waiting",
    )

    def __init__(self, spec: ModelSpec, context: int, cache_tokens: int, now: float) -> None:
        self.spec = spec
        self.context = context
        self._cache_tokens = cache_tokens
        self._cache: PrefixCache | None = None  # made for the first prompt with blocks: only then their size is known
        self.free_slots = [Slot() for _ in range(spec.slots)]  # the one that was used longest ago is the first
        self.waiting: deque[Attempt] = deque()
        self.users = 0
        self.is_ready = False
        self.is_expiring = False
        self.last_used_at = now

    def __repr__(self) -> str:
        state = "expiring" if self.is_expiring else "ready" if self.is_ready else "loading"
        return f"<Runner {self.spec.name} {self.context} {state} {self.users} users>"

    def take_slot(self, request: SimulatedRequest) -> tuple[Slot, int]:
        """Takes a free slot for the request, and returns it with the number of the prompt's tokens that it has in its
        cache. Afterwards the slot holds this prompt and its answer. A slot must be free."""
        blocks = request.blocks
        if not blocks:
            slot = self.free_slots.pop(0)
            slot.blocks = ()
            return slot, 0
        best_index, best_count = best_slot(self.free_slots, request)
        slot = self.free_slots.pop(best_index)
        slot.blocks = request.end_blocks or blocks
        if self._cache_tokens:
            if self._cache is None:
                self._cache = PrefixCache(self._cache_tokens // request.block_tokens)
            best_count = max(best_count, self._cache.count(blocks))
            self._cache.add(slot.blocks)
        return slot, best_count * request.block_tokens

    def cached_tokens(self, request: SimulatedRequest, used_slots: Iterable[Slot]) -> int:
        """The tokens of the request's prompt that the best slot holds; ``used_slots`` are those that will be free
        sooner or later. For the reference policy only: no gateway can know this."""
        if not request.blocks:
            return 0
        slots = self.free_slots or list(used_slots)
        count = best_slot(slots, request)[1] if slots else 0
        if self._cache is not None:
            count = max(count, self._cache.count(request.blocks))
        return count * request.block_tokens


def best_slot(slots: Sequence[Slot], request: SimulatedRequest) -> tuple[int, int]:
    """The index of the slot for this request, and the number of blocks that it shares with the prompt. ``slots`` are
    in the order of their last use, the oldest first."""
    blocks = request.blocks
    first = blocks[0]
    best_index = best_count = 0
    for index, slot in enumerate(slots):
        if slot.blocks and slot.blocks[0] == first:
            count = common_blocks(slot.blocks, blocks)
            if count > best_count:
                best_index, best_count = index, count
    if best_count * request.block_tokens <= MIN_SIMILARITY * request.prompt_tokens:
        # The oldest slot is taken; whatever it shares with the prompt is used too.
        oldest = slots[0].blocks
        return 0, common_blocks(oldest, blocks)
    return best_index, best_count


def common_blocks(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The number of blocks with which both begin. An id stands for all the text up to the end of its block: so where
    two ids at one place are equal, all before them are, and bisection finds the last equal pair."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
