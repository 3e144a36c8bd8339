"""A value in its usual form is read without pydantic. Of any other value Typer says what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated
import typer
from typer.main import get_command
from gpumesh.cli.deferred_parameters import defer_parameters

class Color(StrEnum):
    RED = "red"
    LIGHT_BLUE = "light-blue"

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

@app.command()
def main(
    number: Annotated[int, typer.Option(min=2, max=8)] = 3,
    seconds: Annotated[float | None, typer.Option(min=0.1)] = None,
    text: str = "",
    file: Path | None = None,
    color: Color | None = None,
    flag: bool = False,
    names: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    print([number, seconds, text, file, color, flag, names, "pydantic" in sys.modules])

for line in json.loads(sys.argv[1]):
    try:
        defer_parameters(get_command(app))(line, prog_name="main", standalone_mode=False)
    except Exception as error:
        print(error.format_message())
"""


def run(*command_lines: list[str]) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(command_lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_usual_values_need_no_pydantic(tmp_path: Path) -> None:
    options = ["--number", "8", "--seconds", "0.5", "--text", "7", "--color", "light-blue", "--flag"]
    (output,) = run([*options, "--file", str(tmp_path), "a", "b"])
    assert output == f"[8, 0.5, '7', {tmp_path!r}, <Color.LIGHT_BLUE: 'light-blue'>, True, ['a', 'b'], False]"


def test_other_values_are_left_to_typer() -> None:
    read, *messages = run(
        ["--number", " 5 ", "--seconds", "1e1"],
        ["--number", "9"],
        ["--number", "1"],
        ["--number", "x"],
        ["--seconds", "0"],
        ["--color", "green"],
    )
    assert read.startswith("[5, 10.0,")
    options = ["'--number'", "'--number'", "'--number'", "'--seconds'", "'--color'"]
    assert len(messages) == len(options)
    for message, option in zip(messages, options, strict=True):
        assert message.startswith(f"Invalid value for {option}: ")
