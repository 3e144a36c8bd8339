from __future__ import annotations

import json
from datetime import timedelta

import pytest

from gpumesh.cli import text
from tests.cli.states import AT

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\x9b2J\u202egnp.exe\x7f\x00\u2066"


def test_text_keeps_its_lines_and_loses_what_a_terminal_obeys() -> None:
    cleaned = text.clean_text(f"one\n\ttwo {HOSTILE}\r\n")
    assert cleaned == "one\n\ttwo ]0;owned[31mred[0m2Jgnp.exe\n"
    assert text.clean_text("\ud800") == "?"


def test_a_line_is_one_line() -> None:
    assert text.clean_line(f"a\nb {HOSTILE}") == "a b redgnp.exe"
    assert text.clean_line("x" * 50, 10) == "x" * 9 + "…"


def test_json_is_still_json_and_safe_to_show() -> None:
    value = {"said": HOSTILE, "name": "Öl 東京", "broken": "\ud800"}
    for indent in (None, 2):
        shown = text.json_text(value, indent=indent)
        assert json.loads(shown) == value
        assert all(character.isprintable() or character == "\n" for character in shown)
        assert "東京" in shown


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "?"), (0, "0.0"), (5632, "5.5"), (24564, "24.0"), (102_400, "100"), (102_350, "100")]
)
def test_gib(value: int | None, shown: str) -> None:
    assert text.format_gib(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, text.UNKNOWN), (0.21, "0.2 ms"), (41.2, "41 ms"), (999.9, "1000 ms"), (1500, "1.5 s"), (75_000, "75 s")],
)
def test_milliseconds(value: float | None, shown: str) -> None:
    assert text.format_milliseconds(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0s"), (45.4, "45s"), (240, "4m"), (7200, "2h"), (172_800, "2d"), (59.9, "60s")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert text.format_duration(seconds) == shown


def test_time_left() -> None:
    assert text.format_time_left(None, AT) is None
    assert text.format_time_left(AT + timedelta(minutes=4), AT) == "4m"
    assert text.format_time_left(AT - timedelta(minutes=4), AT) == "0s"
    assert text.format_time_left(AT + timedelta(days=36_500), AT) == "∞"


def test_short_gpu() -> None:
    assert text.short_gpu("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert text.short_gpu("NVIDIA H100 80GB HBM3") == "H100 80GB HBM3"
    assert text.short_gpu("NVIDIA") == "NVIDIA"


def test_shorten() -> None:
    assert text.shorten("abc", 3) == "abc"
    assert text.shorten("abcd", 3) == "ab…"
    assert text.shorten("abcd", 0) == "…"


def test_a_sparkline_tells_nothing_from_zero_and_little_from_nothing() -> None:
    assert text.sparkline((None, 0, 0.4, 50, 100, 130), 100) == " ▁▂▅██"
    assert text.sparkline((), 100) == ""
