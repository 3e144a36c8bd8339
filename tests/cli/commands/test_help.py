"""`gpumesh help`, `version` and `completion`: what needs no mesh and no mesh.yaml."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from gpumesh import __version__
from gpumesh.cli.command_group import COMMANDS
from tests.cli.in_process import invoke


@pytest.mark.parametrize("words", [(), ("status",), ("models",), ("models", "pull"), ("config", "check")])
def test_the_text_is_that_of_the_option(words: tuple[str, ...]) -> None:
    assert invoke("help", *words).out.strip() == invoke(*words, "--help").out.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("staus",), "Did you mean"), (("status", "x"), "no commands of its own"), (("models", "pul"), "Did you mean")],
)
def test_no_such_command(words: tuple[str, ...], said: str) -> None:
    assert said in invoke("help", *words, code=2).err


def test_version() -> None:
    assert invoke("version").out == f"gpumesh {__version__}\n"
    assert json.loads(invoke("version", "-o", "json").out)["gpumesh"] == __version__
    assert "Python 3." in invoke("version", "-v").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_a_completion_script_says_how_it_is_installed(shell: str) -> None:
    script = invoke("completion", shell).out
    assert f"gpumesh completion {shell} >" in script
    assert "_GPUMESH_COMPLETE" in script
    if shell == "zsh":
        assert script.startswith("#compdef gpumesh\n")
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)


def test_the_shell_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert invoke("completion").out == invoke("completion", "fish").out
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "one of bash, zsh, fish, powershell" in invoke("completion", code=2).err


def test_completion_of_help_and_its_commands() -> None:
    from gpumesh.cli.commands.help import complete_commands

    assert complete_commands("sta") == ["status"]
    assert complete_commands("") == list(COMMANDS)
