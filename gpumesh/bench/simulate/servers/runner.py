"""A model in a simulated server's memory: its slots, each with the prompt that it read last, and who waits for a slot.

As llama.cpp's server does it: a request takes the free slot whose content begins like its prompt; if none has a large
part of the prompt, the slot that was used longest ago. A slot that is in use cannot be shared. Besides, a server may
keep what its slots lose (``lost_tokens``), or have a cache of prompts that all slots share (``cache_tokens``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from gpumesh.bench.simulate.fleet import ModelSpec, NodeSpec
from gpumesh.bench.simulate.requests import Attempt, SimulatedRequest
from gpumesh.bench.simulate.servers.blocks import common_blocks
from gpumesh.bench.simulate.servers.lost_prompts import MAX_LOSS, LostPrompts
from gpumesh.bench.simulate.servers.prefix_cache import PrefixCache

# llama.cpp's --slot-prompt-similarity: a slot is chosen for its content if it holds more than this share of the prompt.
MIN_SIMILARITY = 0.1


class Slot:
    """A slot of a runner. ``blocks`` are the ids of the blocks of tokens that its cache holds."""

    __slots__ = ("blocks", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.blocks: tuple[int, ...] = ()


class Runner:
    """A model that is loaded, or is being loaded, for one context length.

    ``users`` counts the attempts that run or wait here. ``is_ready``: the load has ended. ``is_expiring``: it is
    unloaded as soon as it has no users. ``last_used_at``: when the last attempt ended or came. ``misfits`` came while
    it was loading, and need another context length: only when the load has ended, Ollama sees that.
    """

    __slots__ = (
        "_cache",
        "_lost",
        "_node",
        "context",
        "free_slots",
        "is_expiring",
        "is_ready",
        "last_used_at",
        "misfits",
        "spec",
        "users",
        "waiting",
    )

    def __init__(self, spec: ModelSpec, context: int, node: NodeSpec, now: float) -> None:
        self.spec = spec
        self.context = context
        self._node = node
        # Both are made for the first prompt with blocks, because their size is not known before.
        self._cache: PrefixCache | None = None
        self._lost: LostPrompts | None = None
        # In the order of their last use, the oldest first.
        self.free_slots = [Slot(number) for number in range(spec.slots)]
        self.waiting: deque[Attempt] = deque()  # attempts for which no slot is free
        self.misfits: list[Attempt] = []
        self.users = 0
        self.is_ready = False
        self.is_expiring = False
        self.last_used_at = now

    def __repr__(self) -> str:
        state = "expiring" if self.is_expiring else "ready" if self.is_ready else "loading"
        return f"<Runner {self.spec.name} {self.context} {state} {self.users} users>"

    def take_slot(self, request: SimulatedRequest) -> tuple[Slot, int]:
        """Takes a free slot for the request. Returns the slot, and the number of the prompt's tokens in the slot's
        cache. Afterwards the slot holds this prompt and its answer. A slot must be free."""
        blocks = request.blocks
        if not blocks:
            slot = self.free_slots.pop(0)
            if self._lost is not None:
                self._lost.add(slot.blocks)
            slot.blocks = ()
            return slot, 0
        index, count = best_slot(self.free_slots, request)
        slot = self.free_slots.pop(index)
        if self._node.lost_tokens:
            count = self._bring_back(slot, request, count)
        slot.blocks = request.end_blocks or blocks
        if self._node.cache_tokens:
            if self._cache is None:
                self._cache = PrefixCache(self._node.cache_tokens // request.block_tokens)
            count = max(count, self._cache.count(blocks))
            self._cache.add(slot.blocks)
        return slot, count * request.block_tokens

    def _bring_back(self, slot: Slot, request: SimulatedRequest, count: int) -> int:
        """Keeps the prompt that the slot is about to lose, and takes back a better prompt if another slot has lost one.
        ``count``: the blocks of the request that the slot holds. Returns how many it holds afterwards."""
        if self._lost is None:
            self._lost = LostPrompts(self._node.lost_tokens // request.block_tokens)
        if is_similar(count, request) and count >= (1.0 - MAX_LOSS) * len(slot.blocks):
            return count
        self._lost.add(slot.blocks)
        return common_blocks(self._lost.take_better(slot.blocks, request.blocks), request.blocks)

    def cached_tokens(self, request: SimulatedRequest, used_slots: Iterable[Slot]) -> int:
        """The tokens of the request's prompt that the best slot holds. ``used_slots`` are the slots that are busy now.
        For the reference policy only: no gateway can know this."""
        if not request.blocks:
            return 0
        slots = self.free_slots or list(used_slots)
        count = best_slot(slots, request)[1] if slots else 0
        if self._lost is not None:
            count = max(count, common_blocks(self._lost.find_better((), request.blocks), request.blocks))
        if self._cache is not None:
            count = max(count, self._cache.count(request.blocks))
        return count * request.block_tokens


def best_slot(slots: Sequence[Slot], request: SimulatedRequest) -> tuple[int, int]:
    """The index of the slot for this request, and the number of blocks that it shares with the prompt. ``slots`` are in
    the order of their last use, the oldest first. If several slots share the same number, the slot with the lowest
    number is taken."""
    blocks = request.blocks
    first = blocks[0]
    best_index = best_count = 0
    for index, slot in enumerate(slots):
        if slot.blocks and slot.blocks[0] == first:
            count = common_blocks(slot.blocks, blocks)
            if count > best_count or (count == best_count and slot.number < slots[best_index].number):
                best_index, best_count = index, count
    if not is_similar(best_count, request):
        # The oldest slot is taken; whatever it shares with the prompt is used too.
        oldest = slots[0].blocks
        return 0, common_blocks(oldest, blocks)
    return best_index, best_count


def is_similar(count: int, request: SimulatedRequest) -> bool:
    """Whether ``count`` blocks are a large part of the request's prompt."""
    return count * request.block_tokens > MIN_SIMILARITY * request.prompt_tokens
