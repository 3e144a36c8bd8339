"""Reads the hosts that a person names for `init`: ssh command lines, JSON of a provider's tool, or typed answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from gpumesh.cli.init.provider_pods import Pod, read_pods
from gpumesh.cli.init.ssh_command_line import SshLine, parse_ssh_line
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, UsageError

MAX_INPUT_BYTES = 16 << 20


def read_hosts(values: Sequence[str]) -> tuple[list[SshLine], list[Pod]]:
    """Reads the values of ``--from``. Returns the ssh command lines, then the pods. ``-`` stands for standard input,
    which has ssh command lines, or JSON that lists pods. Raises UsageError for any other text."""
    lines: list[SshLine] = []
    pods: list[Pod] = []
    for value in values:
        if value != "-":
            lines.append(parse_ssh_line(value))
            continue
        text = _read_stdin()
        if text.startswith(("{", "[")):
            pods += read_pods(text)
            continue
        for line in text.splitlines():
            is_comment = line.startswith("#")
            if line.strip() and not is_comment:
                lines.append(parse_ssh_line(line))
    return lines, pods


def _read_stdin() -> str:
    """The text of standard input, without the blanks around it; at most MAX_INPUT_BYTES."""
    if sys.stdin.isatty():
        typer.echo("reading from the terminal; Ctrl-D ends the input", err=True)
    return sys.stdin.buffer.read(MAX_INPUT_BYTES).decode("utf-8", "replace").removeprefix("\ufeff").strip()


def ask_for_hosts() -> list[SshLine]:
    """Asks a person for the hosts line by line, until an empty line. Asks again after a line that cannot be read."""
    typer.echo("Where are your GPUs? Paste an ssh command line for each host; an empty line ends the list.", err=True)
    lines: list[SshLine] = []
    while True:
        try:
            text = typer.prompt(f"host {len(lines) + 1}", default="", show_default=False, err=True)
        except typer.Abort:  # Ctrl-C or Ctrl-D
            typer.echo("", err=True)  # ends the line of the question
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        if not text.strip():
            return lines
        try:
            lines.append(parse_ssh_line(text))
        except UsageError as error:
            typer.echo(clean_line(error.message), err=True)
            if error.hint:
                typer.echo(clean_line(f"hint: {error.hint}"), err=True)
