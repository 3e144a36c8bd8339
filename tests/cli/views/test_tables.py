from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.text import Text

from gpumesh.cli.views import tables
from gpumesh.cli.views.tables import Cell, Column
from gpumesh.state import Finding, Severity

HOSTILE = "\x1b]0;owned\x07\x1b[31mred[bold]:smile:"


def drawn(columns: list[tuple[Column, list[Text]]], width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    return tables.render_lines(out, tables.fit_table(columns, width))


def column(title: str, *cells: str, rank: int = 0, least: int | None = None) -> tuple[Column, list[Text]]:
    return Column(title, rank, min_width=least), [Text(cell) for cell in cells]


def test_all_columns_where_there_is_room() -> None:
    lines = drawn([column("A", "one", "two"), column("B", "1", "2", rank=1), column("C", "x", "y", rank=2)], 40)
    assert lines[0] == "A    B  C"
    assert lines[2].split() == ["one", "1", "x"]


def test_the_least_important_go_first_and_none_is_broken() -> None:
    columns = [column("NAME", "iceland"), column("LONG", "x" * 20, rank=2), column("B", "12345", rank=1)]
    assert drawn(columns, 36)[2] == "iceland  " + "x" * 20 + "  12345"
    assert drawn(columns, 35)[2] == "iceland  12345"
    assert drawn(columns, 12)[2] == "iceland"


def test_a_column_that_may_shrink_does_and_takes_what_is_left() -> None:
    columns = [
        column("NAME", "iceland"),
        column("LONG", "abcdefghijklmnop", rank=2, least=6),
        column("B", "12", rank=1),
    ]
    assert drawn(columns, 40)[2] == "iceland  abcdefghijklmnop  12"
    assert drawn(columns, 24)[2] == "iceland  abcdefghij…  12"
    assert drawn(columns, 19)[2] == "iceland  abcde…  12"
    assert drawn(columns, 18)[2] == "iceland  12"


def test_the_first_column_stays_even_where_it_must_be_cut() -> None:
    assert drawn([column("NAME", "vengeance")], 5)[2] == "veng…"


def test_columns_that_say_nothing_go_if_they_are_not_important() -> None:
    columns = [column("A", "x"), column("B", "–", rank=2), column("C", "–", "", rank=3)]  # noqa: RUF001
    assert drawn(columns, 40)[0].split() == ["A", "B"]


def test_wide_letters_count_twice() -> None:
    columns = [column("A", "東京", least=3), column("B", "xxxx", rank=1)]
    assert drawn(columns, 10)[2] == "東京  xxxx"


@pytest.mark.parametrize("wrap", [False, True])
def test_a_table_shows_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str], wrap: bool) -> None:
    tables.print_table(("A", "B"), [(HOSTILE, Cell(HOSTILE, "red"))], wrap=wrap)
    tables.print_fitted_table((Column("A"), Column("B")), [(HOSTILE, Cell(HOSTILE, "red"))])
    out = capsys.readouterr().out
    assert "red[bold]:smile:" in out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_findings([])
    assert capsys.readouterr().out == "no findings\n"
    tables.print_findings(
        [
            Finding("same-gpu", Severity.WARNING, None, "one GPU", "count it once", nodes=("a", "b")),
            Finding("gpu-lost", Severity.ERROR, "c", HOSTILE),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "! a, b same-gpu: one GPU",
        "  → count it once",
        "✗ c gpu-lost: red[bold]:smile:",
    ]


def test_signs_that_a_stream_cannot_carry_become_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    tables.print_findings([Finding("x", Severity.ERROR, "c", "m", "h")])
    assert buffer.getvalue() == b"x c x: m\n  > h\n"


def test_piped_output_is_wide_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert tables.console().width == tables.PIPED_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert tables.console().width == 72


def test_progress_says_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with tables.show_progress(3, "prompts", quiet=False) as tick:
        tick(1, "one failed")
        tick(3)
    assert capsys.readouterr() == ("", "")
