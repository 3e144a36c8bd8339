from __future__ import annotations

import json

from gpumesh.cli.views import safe_text

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\x9b2J\u202egnp.exe\x7f\x00\u2066"


def test_text_keeps_its_lines_and_loses_control_characters() -> None:
    cleaned = safe_text.clean_text(f"one\n\ttwo {HOSTILE}\r\n")
    assert cleaned == "one\n\ttwo ]0;owned[31mred[0m2Jgnp.exe\n"
    assert safe_text.clean_text("\ud800") == "?"


def test_a_line_is_one_line() -> None:
    assert safe_text.clean_line(f"a\nb {HOSTILE}") == "a b redgnp.exe"
    assert safe_text.clean_line("x" * 50, 10) == "x" * 9 + "…"


def test_json_text_is_valid_json_and_safe() -> None:
    value = {"said": HOSTILE, "name": "Öl 東京", "broken": "\ud800"}
    for indent in (None, 2):
        shown = safe_text.json_text(value, indent=indent)
        assert json.loads(shown) == value
        assert all(character.isprintable() or character == "\n" for character in shown)
        assert "東京" in shown
