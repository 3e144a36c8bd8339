"""What a continued answer has twice or lacks, against the answer that nothing disturbed."""

from __future__ import annotations

import pytest

from gpumesh.bench.figures.outages.text_comparison import TextDifference, compare_texts

NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
PIECES = tuple(f"{word} " for word in NUMBERS.split(" "))
WHOLE = "".join(PIECES)


def joined(*numbers: int) -> str:
    return "".join(PIECES[number] for number in numbers)


@pytest.mark.parametrize(
    ("disturbed", "repeated", "lost"),
    [
        (WHOLE, 0, 0),
        (joined(0, 1, 2, 3, *range(3, 12)), 1, 0),
        (joined(*range(5), *range(2, 12)), 3, 0),
        (joined(*range(5), *range(2, 9)), 3, 0),  # the limit of tokens ends it earlier
        (joined(*range(5), *range(6, 12)), 0, 1),
        (joined(*range(4), *range(7, 12)), 0, 3),
        (joined(*range(10)), 0, 2),
        ("", 0, 12),
    ],
)
def test_what_was_repeated_or_lost_is_counted_in_tokens(disturbed: str, repeated: int, lost: int) -> None:
    assert compare_texts(disturbed, PIECES) == TextDifference(repeated, lost)


def test_other_words_cannot_be_counted() -> None:
    other = compare_texts(joined(*range(5)) + "and then something else happened", PIECES)
    assert other.is_other_text
    assert compare_texts(joined(*range(5)) + "x", PIECES).is_other_text, "too short a rest to be found"
