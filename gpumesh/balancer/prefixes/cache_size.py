"""``CacheSize``: how many prompts a server keeps in its cache, as its own reports and its answers show. Pure.

A sequence is a prompt in the cache, with its answer. A server with prefix caching keeps at least the last sequence of
each of its slots. It may keep more: llama-server, and Ollama that runs it, move older sequences to the host's memory
(``--cache-ram``, 8 GiB by default), and vLLM keeps what fits into the GPU's memory. It may keep fewer: other clients
use the server too, or its cache is off. No server reports the number, so we estimate it from the server's answers. If
a server reads a prompt again that we believed to be in its cache, the estimate falls. If a server had a prompt in its
cache that we believed to be gone, the estimate rises.
"""

from __future__ import annotations

import math

from gpumesh.backends.base import ServerCounters

DEFAULT_SLOTS = 4  # of a server that does not say how many it has
# The first estimate of the sequences for each slot: the slot's last sequence, and the sequences that were moved to the
# host's memory. A high estimate costs less than a low one: we see when a prompt was missed in a cache, but we do not
# see that a prompt which we sent to another node would still have been in the cache.
SEQUENCES_PER_SLOT = 64
CONTEXTS_PER_SLOT = 16  # all sequences together have at most so many full contexts for each slot, or LEAST_BYTES
LEAST_BYTES = 4 << 20  # of all its sequences together: about 256,000 tokens, which 8 GiB hold for a model of 3B
BYTES_PER_TOKEN = 4.0  # in English text
MAX_SEQUENCES = 4096  # more are not kept, whatever a server says
MAX_BYTES = 1 << 30

MIN_PROVEN_BYTES = 2048  # less than four blocks prove nothing: a template's own text may be as long
# An answer is a miss if the server had less than MISS_SHARE of the expected bytes in its cache, and a hit if it had
# HIT_SHARE of them or more. In between, the answer shows nothing.
MISS_SHARE = 0.5
HIT_SHARE = 0.75
# A miss adds MISS_DOUBT to the doubt, a hit adds HIT_DOUBT. At MAX_DOUBT (for example after three misses in a row) the
# estimate is halved. So it is halved if more than one of three prompts is missed.
MISS_DOUBT = 2
HIT_DOUBT = -1
MAX_DOUBT = 6
HITS_TO_GROW = 16  # after so many hits without a miss, the estimate grows by one sequence, up to the first estimate
# An unexpected hit is a prompt in the server's cache that we believed to be gone. After so many unexpected hits without
# a miss, the estimate grows by a half.
UNEXPECTED_HITS_TO_GROW = 3


def count_read_tokens(counters: ServerCounters, prefill_tokens_per_s: float | None) -> float | None:
    """How many tokens of a prompt the server has read, because they were not in its cache. ``None`` if not known.

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

    ``sequences``: the estimate of the number of sequences that the server keeps; 0 if its cache seems to be off.
    """

    __slots__ = (
        "_doubt",
        "_first_bytes",
        "_first_sequences",
        "_hits",
        "_least_bytes",
        "_per_slot",
        "_unexpected_hits",
        "sequences",
    )

    def __init__(self, sequences_per_slot: int = SEQUENCES_PER_SLOT, least_bytes: int = LEAST_BYTES) -> None:
        """``sequences_per_slot``: the first estimate of the sequences for each slot. ``least_bytes``: the smallest
        estimate of the cache's size in bytes for a server that reports its context."""
        self._per_slot = sequences_per_slot
        self._least_bytes = least_bytes
        self.sequences = self._first_sequences = DEFAULT_SLOTS * sequences_per_slot
        self._first_bytes = LEAST_BYTES
        self._doubt = 0  # grows with each miss, falls with each hit
        self._hits = self._unexpected_hits = 0

    def __repr__(self) -> str:
        return f"<CacheSize {self.sequences} of {self._first_sequences} sequences, {self.max_bytes} bytes>"

    @property
    def max_bytes(self) -> int:
        """How many bytes all sequences may have together. It grows if the estimate has grown beyond the first estimate,
        but it does not shrink with a smaller estimate."""
        return self._first_bytes * max(self.sequences, self._first_sequences) // self._first_sequences

    def set_server_size(self, slots: int | None, context_tokens: int | None, bytes_per_token: float) -> None:
        """Makes the first estimate from the server's number of slots and the context of one slot in tokens; ``None``:
        unknown. If the number of slots has changed, the estimate changes by the same factor."""
        slots = DEFAULT_SLOTS if slots is None else max(slots, 1)
        sequences = min(slots * self._per_slot, MAX_SEQUENCES)
        if sequences != self._first_sequences:
            self.sequences = min(round(self.sequences * sequences / self._first_sequences), MAX_SEQUENCES)
            self._first_sequences = sequences
        if context_tokens is None:
            self._first_bytes = LEAST_BYTES
        elif context_tokens > 0 and 0.0 < bytes_per_token < math.inf:  # false for NaN
            # ``min`` before ``int``: the product may be infinite.
            contexts = slots * min(CONTEXTS_PER_SLOT, self._per_slot)
            total_bytes = min(float(min(context_tokens, MAX_BYTES)) * contexts * bytes_per_token, MAX_BYTES)
            self._first_bytes = max(int(total_bytes), self._least_bytes)

    def learn(
        self,
        *,
        prompt_bytes: int,
        believed_bytes: int,
        prompt_tokens: float,
        read_tokens: float,
        held_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """Learns from one answer. The prompt had ``prompt_bytes``. By the server's count it had ``prompt_tokens``, of
        which the server has read ``read_tokens``. We believed that ``believed_bytes`` of the prompt were in the
        server's cache, and ``held_sequences`` sequences in all. Figures that are impossible or prove nothing are
        ignored."""
        if not (0.0 <= read_tokens < math.inf and 0.0 < prompt_tokens < math.inf):  # also for NaN
            return
        cached_share = max(1.0 - read_tokens / prompt_tokens, 0.0)
        cached_bytes = cached_share * prompt_bytes
        # In a conversation the new prompt repeats the earlier prompt and the earlier answer. The server has both in its
        # cache, but ``believed_bytes`` counts only the earlier prompt. So up to twice as many bytes are expected.
        if cached_bytes >= 2 * believed_bytes + MIN_PROVEN_BYTES:
            self._count_unexpected_hit()
        elif believed_bytes < MIN_PROVEN_BYTES:
            return
        elif cached_bytes < MISS_SHARE * believed_bytes:
            self._count_miss(held_sequences)
        elif cached_bytes >= HIT_SHARE * believed_bytes:
            self._count_hit()

    def _count_hit(self) -> None:
        """Counts a prompt that was in the cache as we believed. Many hits add one sequence, up to the first
        estimate."""
        self._doubt = max(self._doubt + HIT_DOUBT, 0)
        self._hits += 1
        if self._hits >= HITS_TO_GROW:
            self._hits = 0
            if self.sequences < self._first_sequences:
                self.sequences += 1

    def _count_unexpected_hit(self) -> None:
        """Counts a prompt that was in the cache although we believed it to be gone. Some such hits add a half."""
        self._unexpected_hits += 1
        if self._unexpected_hits >= UNEXPECTED_HITS_TO_GROW:
            self._unexpected_hits = 0
            self.sequences = min(self.sequences + max(self.sequences // 2, 1), MAX_SEQUENCES)

    def _count_miss(self, held_sequences: int) -> None:
        """Counts a prompt that was not in the cache although we believed it to be there. Some misses halve the
        estimate."""
        self._hits = self._unexpected_hits = 0
        self._doubt += MISS_DOUBT
        if self._doubt >= MAX_DOUBT:
            self._doubt = 0
            # The misses happened with ``held_sequences`` in the cache, so the server keeps fewer than these.
            self.sequences = min(self.sequences, max(held_sequences, DEFAULT_SLOTS)) // 2
