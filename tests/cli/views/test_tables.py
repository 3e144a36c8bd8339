from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from gpumesh.cli.views import tables
from gpumesh.cli.views.console import render_lines
from gpumesh.cli.views.tables import Cell, Column

HOSTILE = "\x1b]0;owned\x07\x1b[31mred[bold]:smile:"


def drawn(columns: list[tuple[Column, list[Text]]], width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    return render_lines(out, tables.fit_table(columns, width))


def column(title: str, *cells: str, rank: int = 0, least: int | None = None) -> tuple[Column, list[Text]]:
    return Column(title, rank, min_width=least), [Text(cell) for cell in cells]


def test_all_columns_are_shown_when_they_fit() -> None:
    lines = drawn([column("A", "one", "two"), column("B", "1", "2", rank=1), column("C", "x", "y", rank=2)], 40)
    assert lines[0] == "A    B  C"
    assert lines[2].split() == ["one", "1", "x"]


def test_the_least_important_columns_are_dropped_first() -> None:
    columns = [column("NAME", "iceland"), column("LONG", "x" * 20, rank=2), column("B", "12345", rank=1)]
    assert drawn(columns, 36)[2] == "iceland  " + "x" * 20 + "  12345"
    assert drawn(columns, 35)[2] == "iceland  12345"
    assert drawn(columns, 12)[2] == "iceland"


def test_a_column_with_min_width_shrinks_and_takes_the_rest() -> None:
    columns = [
        column("NAME", "iceland"),
        column("LONG", "abcdefghijklmnop", rank=2, least=6),
        column("B", "12", rank=1),
    ]
    assert drawn(columns, 40)[2] == "iceland  abcdefghijklmnop  12"
    assert drawn(columns, 24)[2] == "iceland  abcdefghij…  12"
    assert drawn(columns, 19)[2] == "iceland  abcde…  12"
    assert drawn(columns, 18)[2] == "iceland  12"


def test_the_first_column_is_cut_rather_than_dropped() -> None:
    assert drawn([column("NAME", "vengeance")], 5)[2] == "veng…"


def test_empty_columns_are_dropped_unless_important() -> None:
    columns = [column("A", "x"), column("B", "–", rank=2), column("C", "–", "", rank=3)]  # noqa: RUF001
    assert drawn(columns, 40)[0].split() == ["A", "B"]


def test_wide_letters_count_twice() -> None:
    columns = [column("A", "東京", least=3), column("B", "xxxx", rank=1)]
    assert drawn(columns, 10)[2] == "東京  xxxx"


@pytest.mark.parametrize("wrap", [False, True])
def test_cells_are_cleaned(capsys: pytest.CaptureFixture[str], wrap: bool) -> None:
    tables.print_table(("A", "B"), [(HOSTILE, Cell(HOSTILE, "red"))], wrap=wrap)
    tables.print_fitted_table((Column("A"), Column("B")), [(HOSTILE, Cell(HOSTILE, "red"))])
    out = capsys.readouterr().out
    assert "red[bold]:smile:" in out
    assert all(character.isprintable() or character == "\n" for character in out)
