from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from gpumesh.cli.commands import down, run, status
from gpumesh.cli.duration_option import duration_parser


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 1.0), ("1s", 1.0), ("0", 0.0), ("0.5", 0.5), ("500ms", 0.5), ("2m", 120.0), ("10.0", 10.0)],
)
def test_a_duration_has_a_unit_or_is_a_number_of_seconds(text: str, seconds: float) -> None:
    assert duration_parser(0.0)(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "", "1 week", "nan", "inf"])
def test_all_else_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no duration: write 500ms, 30s, 2m, or a number of seconds"):
        duration_parser(0.0)(text)


def test_the_least_duration() -> None:
    with pytest.raises(typer.BadParameter, match=r"'50ms' is less than 100ms"):
        duration_parser(0.1)("50ms")


@pytest.mark.parametrize(
    ("app", "arguments"),
    [(down.app, ["--wait", "x"]), (status.app, ["--interval", "x"]), (run.app, ["--timeout", "x", "hello"])],
)
def test_the_commands_take_durations(app: typer.Typer, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "is no duration" in " ".join(result.output.split())
