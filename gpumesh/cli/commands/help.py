"""`gpumesh help [COMMAND]`: the same text as `gpumesh COMMAND --help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpumesh.cli.command_group import COMMANDS, new_app
from gpumesh.errors import UsageError

app = new_app()


def complete_commands(incomplete: str) -> list[str]:
    """The commands that begin with ``incomplete``, for the completion of the shell."""
    return [name for name in COMMANDS if name.startswith(incomplete)]


@app.command("help")
def help_(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[COMMAND]...", autocompletion=complete_commands, show_default=False),
    ] = None,
) -> None:
    """How a command is used; without COMMAND, the list of all. What a finding means: `gpumesh explain`.

    \b
    Examples:
      gpumesh help
      gpumesh help models pull
    """
    context: Any = ctx.find_root()
    rest = list(words or ())
    while rest:
        group = context.command
        if not hasattr(group, "commands"):
            raise UsageError(f"{context.command_path} has no commands of its own, so there is no {rest[0]!r}")
        name, command, rest = group.resolve_command(context, rest)
        # Resilient, so that missing arguments are no error; not any more, so that an unknown command below is one.
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        context.resilient_parsing = False
    typer.echo(context.command.get_help(context))
