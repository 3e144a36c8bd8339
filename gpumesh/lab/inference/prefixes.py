"""The texts that a simulated llama-server keeps in the host's memory after its slots lost them (``--cache-ram``)."""

from __future__ import annotations

from gpumesh.lab.text import count_tokens

MIN_KEPT = 0.25
"""A text is brought back only if at least this share of it is in the new prompt: the rest of it would be lost."""


class LostTexts:
    """Keeps lost texts of at most ``max_tokens`` tokens together, the oldest first. The latest text is always kept,
    even if it alone is longer. All lengths except ``max_tokens`` are in characters.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._texts: list[str] = []

    def save(self, text: str) -> None:
        """Keeps a text that a slot is about to lose, and drops the oldest texts until there is room.

        If one text begins with another, only the longer text is kept: it contains the shorter.
        """
        if not self._max_tokens or not text:
            return
        if any(kept.startswith(text) for kept in self._texts):
            return
        self._texts = [kept for kept in self._texts if not text.startswith(kept)]
        self._texts.append(text)
        while len(self._texts) > 1 and sum(map(count_tokens, self._texts)) > self._max_tokens:
            del self._texts[0]

    def take_better(self, slot_text: str, prompt: str) -> str:
        """Returns the text that the slot should have for this prompt: ``slot_text``, or a better kept text.

        A kept text is better if it has more of the prompt's beginning, and if the prompt also uses a larger share of
        it. The returned text is no longer kept here.
        """
        best, best_common = slot_text, common_prefix_length(slot_text, prompt)
        best_share = best_common / len(slot_text) if slot_text else -1.0  # any share is better than an empty slot
        for text in self._texts:
            common = common_prefix_length(text, prompt)
            share = common / len(text)
            if share >= MIN_KEPT and share > best_share and common > best_common:
                best, best_common, best_share = text, common, share
        if best is not slot_text:
            self._texts.remove(best)
        return best


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
