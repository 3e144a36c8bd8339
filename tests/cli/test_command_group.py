from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gpumesh.cli.command_group import COMMANDS
from gpumesh.cli.root_command import app

RUNNER = CliRunner()


def help_text(*words: str) -> str:
    result = RUNNER.invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    return result.output


@functools.cache
def leaves() -> list[tuple[tuple[str, ...], Any]]:
    """Every command without subcommands, with the words that call it."""
    return leaves_of(get_command(app), ())


def leaves_of(command: Any, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    commands = dict(getattr(command, "commands", {}))
    if not commands:
        return [(words, command)]
    return [leaf for name, inner in commands.items() for leaf in leaves_of(inner, (*words, name))]


def test_help_lists_every_command_and_imports_none() -> None:
    text = help_text()
    for name, (_, said) in COMMANDS.items():
        assert f"  {name} " in text
        assert said.split(",")[0][:40] in text
    script = (
        "import sys; sys.argv = ['gpumesh', '--help']\n"
        "from gpumesh.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'rich', 'yaml', 'httpx', 'aiohttp', 'paramiko', 'pydantic', 'asyncio'}\n"
        "heavy.add('gpumesh.cli.commands.status')\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert importlib.import_module(f"gpumesh.cli.commands.{COMMANDS[name][0]}").app


@pytest.mark.parametrize("words", [words for words, _ in leaves()], ids=" ".join)
def test_every_help_text(words: tuple[str, ...]) -> None:
    text = help_text(*words)
    usage = text.splitlines()[0]
    assert usage.startswith((f"Usage: gpumesh {' '.join(words)} ", f"Usage: root {' '.join(words)} ")), usage
    assert "{" not in usage, "arguments are written as ssh and kubectl write them"
    assert "......" not in usage
    for option in ("-c, --config", "-q, --quiet", "-v, --verbose"):
        assert text.count(option.partition(", ")[2]) >= 1
    assert "TODO" not in text


@pytest.mark.parametrize(
    "name",
    [
        "up",
        "status",
        "run",
        "bench",
        "audit",
        "init",
        "models",
        "env",
        "exec",
        "logs",
        "drain",
        "ssh",
        "describe",
        "completion",
        "help",
    ],
)
def test_common_commands_have_examples(name: str) -> None:
    text = help_text(name)
    if "Examples:" not in text and "Example:" not in text:
        text = help_text(name, "run")
    assert f"    gpumesh {name}" in text or f"gpumesh {name}" in text.partition("Example")[2]


@pytest.mark.parametrize("words", [words for words, _ in leaves()], ids=" ".join)
def test_global_options_may_follow_the_command(words: tuple[str, ...]) -> None:
    (command,) = [command for name, command in leaves() if name == words]
    names = [name for parameter in command.params for name in parameter.opts]
    assert {"--config", "--quiet", "--verbose"} <= set(names)
    assert len(names) == len(set(names)), "no option is there twice"


def test_an_unknown_command_gets_a_suggestion() -> None:
    result = RUNNER.invoke(app, ["staus"])
    assert result.exit_code == 2
    assert "status" in result.output


def test_no_arguments_show_the_help() -> None:
    result = RUNNER.invoke(app, [])
    assert "Commands:" in result.output
