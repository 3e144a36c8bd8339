from __future__ import annotations

import re

import pytest
from prompt_toolkit.utils import get_cwidth

from gpumesh.cli.chat.answer_painter import BOLD, CYAN, DIM, RESET, AnswerPainter

TEXT = """# A heading of some words
Some text with `code in it` and **bold words**, long enough for several lines, 日本語も同じように折り返される。

```python
def f():
\treturn "a line of code that is much longer than the terminal is wide, and is not wrapped"
```
- an item
    - another, indented
"""


def paint(text: str, columns: int = 30, *, size: int = 7, is_plain: bool = True, base: str = "") -> str:
    painter = AnswerPainter(lambda: columns, get_cwidth, is_plain=is_plain, base=base)
    pieces = [painter.feed(text[start : start + size]) for start in range(0, len(text), size)]
    return "".join(pieces) + painter.end()


def test_the_pieces_do_not_matter() -> None:
    assert len({paint(TEXT, size=size, is_plain=False) for size in (1, 2, 5, 1000)}) == 1


@pytest.mark.parametrize("columns", [10, 30, 60, 120])
def test_nothing_is_lost_and_lines_fit(columns: int) -> None:
    painted = paint(TEXT, columns)
    assert re.sub(r"\s", "", painted) == re.sub(r"\s", "", TEXT)
    prose, code, rest = painted.split("```")
    assert code == TEXT.split("```")[1], "code is as it was, with its tabs"
    longest_word = max(map(len, re.findall(r"[ -~]+", TEXT.split("```")[0].replace(" ", "\n"))))
    for line in (prose + rest).splitlines():
        assert get_cwidth(line) <= max(columns, longest_word)


def test_a_wide_terminal_changes_nothing() -> None:
    assert paint(TEXT, 500) == TEXT


def test_colours() -> None:
    painted = paint("# Head\na `b c` **d**.\n```\ne\n```\nf **g\nh", 80, is_plain=False)
    head, line, fence, code, _, bold, plain = painted.splitlines()
    assert head == f"{BOLD}#{RESET} {BOLD}Head{RESET}"
    in_code = "".join(f"{CYAN}{part}{RESET}" for part in ("`", "b")) + f" {CYAN}c{RESET}{CYAN}`{RESET}"
    assert line == f"a {in_code} " + "".join(f"{BOLD}{part}{RESET}" for part in ("**", "d", "**")) + "."
    assert (fence, code) == (f"{CYAN}```{RESET}", f"{CYAN}e{RESET}")
    assert bold.startswith("f ")
    assert plain == "h", "a mark that was not closed ends with its line"
    assert paint("a `b`", 80, is_plain=False, base=DIM) == f"{DIM}a{RESET} {DIM}`b`{RESET}\n"


def test_the_width_may_change_meanwhile() -> None:
    columns = 40
    painter = AnswerPainter(lambda: columns, get_cwidth, is_plain=True)
    first = painter.feed("word " * 8)
    columns = 12
    assert all(len(line) < 12 for line in (painter.feed("word " * 8) + painter.end()).splitlines()[1:])
    assert max(map(len, first.splitlines())) > 30
