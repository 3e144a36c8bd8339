from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpumesh.cli.commands.demo import NEXT_STEPS
from gpumesh.cli.program_name import program_name


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program in an environment that is not on PATH."""
    made = tmp_path / "project" / ".venv" / "bin" / "gpumesh"
    made.parent.mkdir(parents=True)
    made.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(made.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return made


def test_a_program_on_path_has_its_name(script: Path, tmp_path: Path) -> None:
    (tmp_path / "gpumesh").symlink_to(script)
    assert program_name() == "gpumesh"


def test_a_program_that_is_not_on_path_has_its_path(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpumesh").touch(0o755)  # another one
    monkeypatch.chdir(tmp_path / "project")
    assert program_name() == ".venv/bin/gpumesh"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert program_name() == str(script)


def test_without_a_script_the_module_is_run(script: Path) -> None:
    script.unlink()
    assert program_name() == f"{script.with_name('python')} -m gpumesh"


@pytest.mark.parametrize("program", ["gpumesh", ".venv/bin/gpumesh"])
def test_the_closing_text_of_the_demo_fits_80_columns(program: str) -> None:
    text = NEXT_STEPS.format(program=program)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(program) == 4
