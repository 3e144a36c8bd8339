"""Compares an answer that another node continued with the answer to the same prompt that nothing disturbed. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# A shorter rest can be in the undisturbed answer by chance.
MIN_REST_CHARS = 12


@dataclass(frozen=True, slots=True)
class TextDifference:
    """How many tokens the disturbed answer has twice, and how many it lacks. Both are ``None`` if its text differs from
    the undisturbed answer after the cut: then nothing can be counted."""

    repeated: int | None
    lost: int | None

    @property
    def is_other_text(self) -> bool:
        return self.repeated is None


def compare_texts(disturbed: str, undisturbed: Sequence[str]) -> TextDifference:
    """Compares the two answers. ``undisturbed`` has the answer's pieces, one for each token.

    Both answers begin with the same text. The rest of the disturbed answer is searched in the undisturbed answer. If
    the rest is found later than at the end of the same text, the tokens between were lost. If it is found earlier, the
    tokens between were repeated.
    """
    undisturbed_text = "".join(undisturbed)
    if disturbed == undisturbed_text:
        return TextDifference(0, 0)
    same = _count_equal_start(disturbed, undisturbed_text)
    rest = disturbed[same:]
    if not rest:  # the end is missing
        return TextDifference(0, _tokens_within(undisturbed, same, len(undisturbed_text)))
    if len(rest) < MIN_REST_CHARS:
        return TextDifference(None, None)
    earlier = undisturbed_text.rfind(rest, 0, same + len(rest) - 1)
    later = undisturbed_text.find(rest, same)
    if later >= 0:
        return TextDifference(0, _tokens_within(undisturbed, same, later))
    if earlier >= 0:
        return TextDifference(_tokens_within(undisturbed, earlier, same), 0)
    return TextDifference(None, None)


def _count_equal_start(a: str, b: str) -> int:
    """How many characters at their start are equal."""
    for number, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return number
    return min(len(a), len(b))


def _tokens_within(pieces: Sequence[str], begin: int, end: int) -> int:
    """How many pieces begin in this range of the characters of the text."""
    starts = itertools.accumulate((len(piece) for piece in pieces[:-1]), initial=0)
    return sum(begin <= start < end for start in starts)
