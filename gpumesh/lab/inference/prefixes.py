"""What llama-server remembers of texts that its slots have lost: its cache in the host's memory (``--cache-ram``)."""

from __future__ import annotations

from gpumesh.lab.text import count_tokens

MIN_KEPT = 0.25
"""A text is brought back only if at least this share of it is in the new prompt: the rest of it would be lost."""


class LostTexts:
    """The texts, the oldest first, of at most ``max_tokens`` tokens together; the latest one may be longer.

    Its lengths are in characters, but for ``max_tokens``.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._texts: list[str] = []

    def save(self, text: str) -> None:
        """Keeps a text that a slot is about to lose. A text that another one begins with is in that one."""
        if not self._max_tokens or not text or any(kept.startswith(text) for kept in self._texts):
            return
        self._texts = [kept for kept in self._texts if not text.startswith(kept)]
        self._texts.append(text)
        while len(self._texts) > 1 and sum(map(count_tokens, self._texts)) > self._max_tokens:
            del self._texts[0]

    def take_better(self, slot_text: str, prompt: str) -> str:
        """The text that the slot should have for this prompt: its own, or a kept one, which is then in the slot only.

        The kept one must be better in both: how much of the prompt it has, and how much of it is kept.
        """
        best, best_common = slot_text, common_prefix_length(slot_text, prompt)
        best_kept = best_common / len(slot_text) if slot_text else -1.0
        for text in self._texts:
            common = common_prefix_length(text, prompt)
            kept = common / len(text)
            if kept >= MIN_KEPT and kept > best_kept and common > best_common:
                best, best_common, best_kept = text, common, kept
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
