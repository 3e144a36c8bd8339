from __future__ import annotations

import pytest

from gpumesh.cli.views.live.screen import diff_screen, parse_keys


@pytest.mark.parametrize(
    ("data", "pressed"),
    [
        (b"q", ["q"]),
        (b"dr", ["d", "r"]),
        (b"\x1b[A\x1bOB\x1b[5~\x1b[6~", ["up", "down", "page up", "page down"]),
        (b"\x1b[H\x1bOF\x1b[1~\x1b[4~", ["home", "end", "home", "end"]),
        (b"\x1b", ["escape"]),
        (b"\x1b\x1b", ["escape", "escape"]),
        (b"\x1b[200~q\x1b[201~", ["q"]),  # pasted
        (b"\x1b[<0;10;20Mq", ["q"]),  # a mouse
        (b"\x1b[1;5", []),  # cut short
        (b"\r\n\t \x00\x7f", []),
        ("é東".encode(), []),
        (b"", []),
    ],
)
def test_keys(data: bytes, pressed: list[str]) -> None:
    assert list(parse_keys(data)) == pressed


class Screen:
    """Enough of a terminal: lines that are addressed, erased and written."""

    def __init__(self, height: int) -> None:
        self.lines = ["old" for _ in range(height)]

    def write(self, text: str) -> None:
        for part in text.split("\x1b[")[1:]:
            code = next(place for place, character in enumerate(part) if character.isalpha())
            head, action, rest = part[:code], part[code], part[code + 1 :]
            if action == "H":
                self.row = int(head.split(";")[0]) - 1
            elif action == "K":
                self.lines[self.row] = rest
            elif action == "J":
                self.lines[self.row :] = [""] * (len(self.lines) - self.row)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([], ["a", "b"]),
        (["a", "b"], ["a", "c"]),
        (["a", "b", "c"], ["a"]),
        (["a"], ["a", "b", "c"]),
        (["a", "b"], []),
        (["", "x"], ["x", ""]),
    ],
)
def test_diff_screen_turns_one_screen_into_another(old: list[str], new: list[str]) -> None:
    screen = Screen(5)
    screen.lines = [*old, *[""] * (5 - len(old))]
    screen.write(diff_screen(old, new))
    assert screen.lines == [*new, *[""] * (5 - len(new))]


def test_only_changed_lines_are_written_in_one_update() -> None:
    assert diff_screen(["a", "b"], ["a", "b"]) == ""
    text = diff_screen(["unchanged", "b", "unchanged too"], ["unchanged", "c", "unchanged too"])
    assert "unchanged" not in text
    assert text.startswith("\x1b[?2026h")
    assert text.endswith("\x1b[?2026l")
    assert "\x1b[2J" not in text, "a screen that is erased first flickers"
