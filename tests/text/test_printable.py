from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.text.printable import printable

FAMILY = "\U0001f469\u200d\U0001f680"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H", ""),
        ("\x9b31mred\x9bm", "red"),
        ("\x1b]0;title\x07name", "name"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9d0;title\x9cname", "name"),
        ("\x1bP1$r\x1b\\x", "x"),
        ("\x1b_G\x1b\\x\x1b^p\x1b\\y\x1bXs\x1b\\z", "xyz"),
        ("\x1b(0lqk\x1b(B", "lqk"),
        ("\x1bcreset", "reset"),
        ("a\x00b\x08c\x7fd", "abcd"),
        ("a\rb\nc\td\x0be\x0cf", "a b c d e f"),
        ("  a   b  ", "a b"),
        ("a\u00a0b\u2003c\u2028d", "a b c d"),
        ("\u202eevil\u2066x\u200f\ufeff", "evilx"),
        ("na\u00efve \u65e5\u672c\u8a9e \U0001f642", "na\u00efve \u65e5\u672c\u8a9e \U0001f642"),
        ("\ud800x\udfff", "x"),
        ("\ue000x", "x"),
        (b"\xff\xfebytes", "\ufffd\ufffdbytes"),
        (b"caf\xc3\xa9", "caf\u00e9"),
        ("\x1b[", ""),
        ("\x1b", ""),
        ("\x1b]never ended", ""),
        ("", ""),
        (b"", ""),
    ],
)
def test_control_characters_are_removed(said: str | bytes, shown: str) -> None:
    assert printable(said) == shown


def test_removing_an_escape_makes_no_other() -> None:
    assert printable("\x1b\x1b[31m[31mx") == "[31mx"
    assert "\x1b" not in printable("\x1b]a\x1b]b\x07c\x07[31md")


def test_long_text_ends_with_an_ellipsis() -> None:
    assert printable("x" * 301) == "x" * 299 + "…"
    assert printable("x" * 300) == "x" * 300
    assert printable("abcdef", 3) == "ab…"
    assert printable("abc", 3) == "abc"


def test_an_endless_text_costs_little() -> None:
    assert len(printable("\x1b[31m" * 10_000_000, 10)) <= 10
    assert len(printable(b"\x1b" * 100_000_000, 10)) <= 10


SAID = st.text() | st.text(alphabet="\x1b\x9b\x9d\x9c\x07[]0;m\\Pab \n\u202e") | st.binary()


@given(SAID, st.integers(1, 400))
def test_any_text_becomes_one_plain_line(said: str | bytes, limit: int) -> None:
    shown = printable(said, limit)
    assert len(shown) <= limit
    assert not any(unicodedata.category(character).startswith("C") for character in shown)
    assert shown == shown.strip()
    assert "  " not in shown
    assert "\n" not in shown
    shown.encode()


@given(SAID)
def test_clean_text_is_unchanged(said: str | bytes) -> None:
    shown = printable(said)
    assert printable(shown) == shown
