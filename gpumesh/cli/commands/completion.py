"""`gpumesh completion SHELL`: prints the script that lets a shell complete commands, nodes and models."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.completion_scripts import make_script
from gpumesh.errors import UsageError

app = new_app()


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"
    POWERSHELL = "powershell"


# How a person installs the script, as lines of a comment in it.
_INSTALLATION = {
    Shell.BASH: (
        "For this shell:     source <(gpumesh completion bash)",
        "For all to come:    gpumesh completion bash > ~/.local/share/bash-completion/completions/gpumesh",
        "                    (needs the package bash-completion; else append the first line to ~/.bashrc)",
    ),
    Shell.ZSH: (
        "For this shell:     source <(gpumesh completion zsh)",
        'For all to come:    gpumesh completion zsh > "${fpath[1]}/_gpumesh", then start a new shell',
        '                    (~/.zshrc must have "autoload -Uz compinit; compinit")',
    ),
    Shell.FISH: (
        "For this shell:     gpumesh completion fish | source",
        "For all to come:    gpumesh completion fish > ~/.config/fish/completions/gpumesh.fish",
    ),
    Shell.POWERSHELL: (
        "For this shell:     gpumesh completion powershell | Out-String | Invoke-Expression",
        "For all to come:    gpumesh completion powershell >> $PROFILE",
    ),
}


@app.command()
def completion(
    shell: Annotated[Shell | None, typer.Argument(metavar="[SHELL]", help="bash, zsh, fish or powershell.")] = None,
) -> None:
    """Print the script that lets a shell complete commands, options, nodes and models. Without SHELL, for $SHELL.

    The script's first lines say how to install it.

    \b
    Examples:
      source <(gpumesh completion bash)
      gpumesh completion fish > ~/.config/fish/completions/gpumesh.fish
    """
    shell = shell or _user_shell()
    first_line, *lines = make_script(shell).splitlines()
    comment = [f"# {line}" for line in ("Completes gpumesh.", *_INSTALLATION[shell])]
    # zsh knows a file in $fpath by its first line.
    script = [first_line, *comment, *lines] if first_line.startswith("#compdef") else [*comment, first_line, *lines]
    typer.echo("\n".join(script))


def _user_shell() -> Shell:
    """The user's shell. Raises UsageError if $SHELL is none that completion is made for."""
    from gpumesh.config import environment

    name = environment.shell() or ""
    try:
        return Shell("powershell" if name == "pwsh" else name)
    except ValueError:
        raise UsageError("for which shell?", hint=f"one of {', '.join(Shell)}: gpumesh completion bash") from None
