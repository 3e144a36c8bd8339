"""`gpumesh config`: checks mesh.yaml, shows the configuration that is in effect, prints the JSON Schema."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.errors import ExitCode, UsageError

MAX_KEY_CHARS = 4096
SAFE_KEY_CHARS = 20  # a shorter key could be found from its hash by trying

app = new_app(no_args_is_help=True)


@app.callback()
def config() -> None:
    """Check or show the configuration; its JSON Schema for editors."""


@app.command()
def check(ctx: typer.Context) -> None:
    """Say all that is wrong with mesh.yaml, or that nothing is, and whether a running mesh has it so. Asks no host."""
    from gpumesh import config as configuration
    from gpumesh.cli.views.changed_file import print_finding, watch_running_file
    from gpumesh.cli.views.safe_text import clean_line
    from gpumesh.state import Severity

    options = global_options(ctx)
    topology = options.topology()
    findings = configuration.check(topology)
    for finding in findings:
        typer.echo(clean_line(f"{finding.severity}: {finding.node or topology.name}: {finding.message}"), err=True)
        if finding.hint:
            typer.echo(clean_line(f"  hint: {finding.hint}"), err=True)
    has_errors = any(finding.severity is Severity.ERROR for finding in findings)
    if not options.quiet:
        count = len(topology.nodes)
        disabled_count = sum(not node.enabled for node in topology.nodes)
        count_text = f"{count} node{'' if count == 1 else 's'}"
        disabled_text = f", {disabled_count} of them disabled" if disabled_count else ""
        error_text = "; but not all of it can work from here" if has_errors else ""
        typer.echo(
            clean_line(f"{topology.source or 'the configuration'} is valid: {count_text}{disabled_text}{error_text}")
        )
        print_finding(watch_running_file(options.paths()).find())
    if has_errors:
        raise typer.Exit(int(ExitCode.USAGE))


@app.command()
def show(ctx: typer.Context) -> None:
    """The configuration as it is in effect: defaults merged, variables expanded, secrets masked."""
    from gpumesh import config as configuration

    typer.echo(configuration.dump_effective(global_options(ctx).topology()), nl=False)


@app.command()
def schema() -> None:
    """The JSON Schema of mesh.yaml, for editors."""
    from gpumesh import config as configuration

    typer.echo(json.dumps(configuration.schema(), indent=2))


@app.command("hash-key")
def hash_key(
    new: Annotated[bool, typer.Option("--new", help="Make a new random key, and print it before its hash.")] = False,
) -> None:
    """The SHA-256 of a client's API key, for `hash` under gateway.keys. Asks for the key, or reads it from stdin.

    \b
    Examples:
      gpumesh config hash-key
      gpumesh config hash-key < guest.key
      gpumesh config hash-key --new
    """
    import secrets

    from gpumesh.gateway.access.api_keys import hash_key as compute_hash

    if new:
        key = f"gm-{secrets.token_urlsafe(32)}"
        typer.echo(f"key:  {key}\nhash: {compute_hash(key.encode()).hex()}")
        return
    key = _read_key()
    if len(key) < SAFE_KEY_CHARS:
        typer.echo(
            "warning: so short a key can be found from its hash by trying; `gpumesh config hash-key --new` makes one",
            err=True,
        )
    typer.echo(compute_hash(key.encode("utf-8", "surrogateescape")).hex())


def _read_key() -> str:
    """The key that a person types, unseen, or that stdin holds. Raises UsageError if there is none, or if it could not
    be sent in a header."""
    if sys.stdin.isatty():
        key = str(typer.prompt("API key", hide_input=True, err=True))
    else:
        key = sys.stdin.read(MAX_KEY_CHARS + 1).strip()
    if not key:
        raise UsageError("there is no key to hash", hint="`gpumesh config hash-key --new` makes one")
    if len(key) > MAX_KEY_CHARS or not key.isprintable() or " " in key:
        raise UsageError("a key is one word in one line", hint="`gpumesh config hash-key --new` makes one")
    return key
