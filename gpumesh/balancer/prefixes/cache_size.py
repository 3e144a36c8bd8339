"""``CacheSize``: how many prompts a server keeps in its cache, as its own reports and its answers show. Pure.

A sequence is a prompt in the cache, with its answer. A server with prefix caching keeps at least the last sequence of
each of its slots. It may keep more: llama-server, and Ollama that runs it, move older sequences to the host's memory
(``--cache-ram``, 8 GiB by default), and vLLM keeps what fits into the GPU's memory. It may keep fewer: other clients
use the server too, or its cache is off. No server says how many. So its answers are compared with what was believed.
Where a server reads prompts again that it should have had, it is believed to keep fewer sequences. Where it has had
prompts that were believed to be gone, it is believed to keep more.
"""

from __future__ import annotations

import math

from gpumesh.backends.base import ServerCounters

DEFAULT_SLOTS = 4  # of a server that does not say how many it has
# At first a server is believed to keep so many sequences for each slot: its last one, and those that it has moved to
# the host's memory. Memory is the limit there, not a number. To believe too much costs less than to believe too little:
# a miss is seen, a prompt that was sent elsewhere is not.
SEQUENCES_PER_SLOT = 64
CONTEXTS_PER_SLOT = 16  # all sequences together have at most so many full contexts for each slot, or LEAST_BYTES
LEAST_BYTES = 4 << 20  # of all its sequences together: about 256,000 tokens, which 8 GiB hold for a model of 3B
BYTES_PER_TOKEN = 4.0  # in English text
MAX_SEQUENCES = 4096  # more are not kept, whatever a server says
MAX_BYTES = 1 << 30

MIN_PROVEN_BYTES = 2048  # less than four blocks prove nothing: a template's own text may be as long
# A server has missed if it had less than MISS_SHARE of the bytes that it was believed to have, and has hit if it had
# HIT_SHARE of them or more. In between, its answer shows nothing.
MISS_SHARE = 0.5
HIT_SHARE = 0.75
# A miss adds MISS_DOUBT to the doubt, a hit HIT_DOUBT. At MAX_DOUBT (three misses in a row, for example) the server is
# believed to keep half as many sequences. So this happens if more than one of three prompts is missed.
MISS_DOUBT = 2
HIT_DOUBT = -1
MAX_DOUBT = 6
HITS_TO_GROW = 16  # hits without a miss after which one sequence more is believed, up to the number stated at first
# A surprise is a prompt that the server had, but was believed not to have. After so many without a miss, half as many
# sequences more are believed.
SURPRISES_TO_GROW = 3


def count_read_tokens(counters: ServerCounters, prefill_tokens_per_s: float | None) -> float | None:
    """How many tokens of a prompt the server has read: those that were not in its cache. ``None`` if it is not known.

    Ollama does not report this number: its ``prompt_eval_count`` is the whole prompt. But it reports the time of the
    reading, ``prompt_eval_duration``. This time multiplied by the rate of reading is the number.
    ``prefill_tokens_per_s`` is the rate; ``None`` if it is not known.
    """
    if counters.prompt_tokens is None:
        return None
    if counters.cached_tokens is not None:
        return float(counters.prompt_tokens - counters.cached_tokens)
    if counters.prompt_ms is None or prefill_tokens_per_s is None:
        return None
    return min(counters.prompt_ms / 1000.0 * prefill_tokens_per_s, float(counters.prompt_tokens))


class CacheSize:
    """The size of one server's cache for one residency key.

    - ``sequences``: how many sequences the server is believed to keep; 0 if its cache seems to be off.
    """

    __slots__ = (
        "_doubt",
        "_hits",
        "_least_bytes",
        "_per_slot",
        "_stated_bytes",
        "_stated_sequences",
        "_surprises",
        "sequences",
    )

    def __init__(self, sequences_per_slot: int = SEQUENCES_PER_SLOT, least_bytes: int = LEAST_BYTES) -> None:
        """``sequences_per_slot``: how many sequences a server is believed at first to keep for each of its slots.
        ``least_bytes``: if it states its context, its cache is never believed to be smaller than this."""
        self._per_slot = sequences_per_slot
        self._least_bytes = least_bytes
        self.sequences = self._stated_sequences = DEFAULT_SLOTS * sequences_per_slot
        self._stated_bytes = LEAST_BYTES
        self._doubt = self._hits = self._surprises = 0

    def __repr__(self) -> str:
        return f"<CacheSize {self.sequences} of {self._stated_sequences} sequences, {self.max_bytes} bytes>"

    @property
    def max_bytes(self) -> int:
        """How many bytes all sequences may have together. It grows where more sequences are believed than were stated,
        but does not shrink where fewer are."""
        return self._stated_bytes * max(self.sequences, self._stated_sequences) // self._stated_sequences

    def state(self, slots: int | None, context_tokens: int | None, bytes_per_token: float) -> None:
        """Takes what the server says of itself: its slots, and the context of one slot in tokens; ``None``: unknown.
        If the number of slots has changed, the believed number of sequences changes by the same factor."""
        slots = DEFAULT_SLOTS if slots is None else max(slots, 1)
        sequences = min(slots * self._per_slot, MAX_SEQUENCES)
        if sequences != self._stated_sequences:
            self.sequences = min(round(self.sequences * sequences / self._stated_sequences), MAX_SEQUENCES)
            self._stated_sequences = sequences
        if context_tokens is None:
            self._stated_bytes = LEAST_BYTES
        elif context_tokens > 0 and 0.0 < bytes_per_token < math.inf:  # false for NaN
            # ``min`` before ``int``: the product may be infinite.
            contexts = slots * min(CONTEXTS_PER_SLOT, self._per_slot)
            bytes_of_all = min(float(min(context_tokens, MAX_BYTES)) * contexts * bytes_per_token, MAX_BYTES)
            self._stated_bytes = max(int(bytes_of_all), self._least_bytes)

    def learn(
        self,
        *,
        prompt_bytes: int,
        believed_bytes: int,
        prompt_tokens: float,
        read_tokens: float,
        held_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """Learns from one answer. The prompt had ``prompt_bytes``, or ``prompt_tokens`` by the server's count, of which
        the server has read ``read_tokens``. It was believed to have ``believed_bytes`` in its cache, and
        ``held_sequences`` in all. Impossible figures are ignored, and so are figures that prove nothing."""
        if not (0.0 <= read_tokens < math.inf and 0.0 < prompt_tokens < math.inf):  # also for NaN
            return
        cached_share = max(1.0 - read_tokens / prompt_tokens, 0.0)
        cached_bytes = cached_share * prompt_bytes
        # Twice: in a conversation, the server also has its own earlier answers in the cache. These are a part of the
        # new prompt, but were not a part of the old one, by which the belief goes.
        if cached_bytes >= 2 * believed_bytes + MIN_PROVEN_BYTES:
            self._count_surprise()
        elif believed_bytes < MIN_PROVEN_BYTES:
            return
        elif cached_bytes < MISS_SHARE * believed_bytes:
            self._count_miss(held_sequences)
        elif cached_bytes >= HIT_SHARE * believed_bytes:
            self._count_hit()

    def _count_hit(self) -> None:
        """Counts a prompt that the server had as believed. Many hits make one sequence more, up to the stated
        number."""
        self._doubt = max(self._doubt + HIT_DOUBT, 0)
        self._hits += 1
        if self._hits >= HITS_TO_GROW:
            self._hits = 0
            if self.sequences < self._stated_sequences:
                self.sequences += 1

    def _count_surprise(self) -> None:
        """Counts a prompt that the server was believed not to have. Some surprises make half as many sequences
        more."""
        self._surprises += 1
        if self._surprises >= SURPRISES_TO_GROW:
            self._surprises = 0
            self.sequences = min(self.sequences + max(self.sequences // 2, 1), MAX_SEQUENCES)

    def _count_miss(self, held_sequences: int) -> None:
        self._hits = self._surprises = 0
        self._doubt += MISS_DOUBT
        if self._doubt >= MAX_DOUBT:
            self._doubt = 0
            # With these sequences it has missed already, however many more it was believed to have room for.
            self.sequences = min(self.sequences, max(held_sequences, DEFAULT_SLOTS)) // 2
