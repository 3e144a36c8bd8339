"""Reads the hosts that a person names for `init`: ssh command lines, JSON of a provider's tool, or typed answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import typer

from gpumesh.cli.init.provider_pods import Pod, read_pods
from gpumesh.cli.init.ssh_command_line import SshLine, parse_ssh_line
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, GPUMeshError
from gpumesh.text.quoting import shell_word

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


def ask_for_hosts(check: Callable[[SshLine], None]) -> tuple[list[SshLine], list[str]]:
    """Asks a person for the hosts line by line, until an empty line or Ctrl-D. Asks again after a line that cannot be
    read, or for which ``check`` raises GPUMeshError. After Ctrl-C it shows what was typed, as a command. Returns the
    hosts, and what was typed for each."""
    typer.echo("Where are your GPUs? Paste an ssh command line for each host; an empty line ends the list.", err=True)
    lines: list[SshLine] = []
    texts: list[str] = []
    while True:
        try:
            text = typer.prompt(f"host {len(lines) + 1}", default="", show_default=False, err=True)
        except typer.Abort as abort:
            typer.echo("", err=True)  # ends the line of the question
            if isinstance(abort.__context__, EOFError):  # Ctrl-D, otherwise Ctrl-C
                return lines, texts
            show_typed_hosts(texts)
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
        if not text.strip():
            return lines, texts
        try:
            line = parse_ssh_line(text)
            check(line)
        except GPUMeshError as error:
            typer.echo(clean_line(error.message), err=True)
            if error.hint:
                typer.echo(clean_line(f"hint: {error.hint}"), err=True)
            continue
        lines.append(line)
        texts.append(text.strip())


def show_typed_hosts(texts: Sequence[str]) -> None:
    """Shows hosts that a person has typed as a command that has them all, so that nothing has to be typed again."""
    if texts:
        options = " ".join(f"--from {shell_word(text)}" for text in texts)
        typer.echo(clean_line(f"what you typed: gpumesh init {options}", 2000), err=True)


def mark_aliases(lines: Sequence[SshLine]) -> list[SshLine]:
    """The lines, where a host alone (``ssh workstation``) is an alias if ~/.ssh/config has settings for it: ssh would
    use them, too."""
    from gpumesh.config import environment
    from gpumesh.config.ssh import ssh_config

    marked_lines = []
    for line in lines:
        has_settings = False
        is_host_alone = line == SshLine(line.host, given_name=line.given_name, forwarded_ports=line.forwarded_ports)
        if is_host_alone and "." not in line.host:  # a name with a dot, or an address, is a host itself
            with contextlib.suppress(ValueError):  # no name of a Host, or ssh cannot read its configuration
                has_settings = ssh_config.resolve_alias(line.host, home=environment.home()).configured
        marked_lines.append(replace(line, is_alias=has_settings))
    return marked_lines
