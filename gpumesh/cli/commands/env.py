"""`gpumesh env`: prints the environment variables that make other programs use the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.gateway_address import find_gateway
from gpumesh.cli.global_options import global_options
from gpumesh.text.quoting import powershell_word, shell_word

app = new_app()

# OpenAI's and Anthropic's packages do not start without a key, even where the gateway asks for none. One of these
# variables is enough for each.
REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = {
    "OPENAI_API_KEY": ("OPENAI_API_KEY",),
    "ANTHROPIC_API_KEY": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
}
PLACEHOLDER_KEY = "gpumesh"  # any text will do
# All variables with which the packages send a key.
KEY_VARIABLES = (*REQUIRED_KEYS, "OLLAMA_API_KEY")


class ShellKind(StrEnum):
    SH = "sh"
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"
    POWERSHELL = "powershell"


@app.command()
def env(
    ctx: typer.Context,
    shell: Annotated[ShellKind | None, typer.Option(help="Else the one of $SHELL.")] = None,
) -> None:
    """Print the variables that point other programs at the mesh.

    \b
    Examples:
      eval "$(gpumesh env)"                                  sh, bash, zsh
      gpumesh env --shell fish | source
      gpumesh env --shell powershell | Out-String | iex
    """
    from gpumesh.config.credentials import is_secret_set

    options = global_options(ctx)
    gateway = find_gateway(options)
    shell = shell or _user_shell()
    lines = [export_lines(client_variables(gateway.url), shell)]
    if not gateway.needs_key:
        lines.append(export_lines(missing_keys(is_secret_set), shell))
    else:
        source = next(filter(is_secret_set, gateway.key_variables), None)
        if source is not None:
            lines.append(copy_lines(source, shell))
        if not options.quiet:
            typer.echo(_describe_key(gateway.key_variables, source), err=True)
    typer.echo("\n".join(filter(None, lines)))


def client_variables(url: str) -> dict[str, str]:
    """The variables that clients read, by name, with the gateway's base URL as each client expects it.

    The variables of keys are left out (``missing_keys``, ``copy_lines``)."""
    return {"OLLAMA_HOST": url, "OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url}


def missing_keys(is_set: Callable[[str], bool]) -> dict[str, str]:
    """Placeholders for the keys that packages insist on, where the gateway asks for none. A key that the user has set
    stays as it is. ``is_set`` returns whether the variable has a value."""
    return {name: PLACEHOLDER_KEY for name, names in REQUIRED_KEYS.items() if not any(map(is_set, names))}


def copy_lines(source: str, shell: ShellKind) -> str:
    """The commands that give the clients the key that is in the variable ``source``. The key itself is not printed."""
    match shell:
        case ShellKind.FISH:
            lines = [f'set -gx {name} "${source}";' for name in KEY_VARIABLES]
        case ShellKind.POWERSHELL:
            lines = [f"$Env:{name} = $Env:{source}" for name in KEY_VARIABLES]
        case _:
            lines = [f'export {name}="${source}"' for name in KEY_VARIABLES]
    return "\n".join(lines)


def _describe_key(variables: tuple[str, ...], source: str | None) -> str:
    """Tells that the gateway asks for a key, and where the clients' variables have it from. ``variables`` are those
    that mesh.yaml names for keys; ``source`` is the variable that is set here."""
    if source is not None:
        return f"the gateway asks for a key: {', '.join(KEY_VARIABLES)} get the one in ${source}"
    if variables:
        example = shell_word(variables[0])
        return (
            f"the gateway asks for a key, and no variable of mesh.yaml holds one here: `export {example}=…`, then again"
        )
    return f"the gateway asks for a key: set {', '.join(KEY_VARIABLES)} to yours"


def export_lines(variables: Mapping[str, str], shell: ShellKind) -> str:
    """The commands that set and export the variables in this shell, a line for each."""
    match shell:
        case ShellKind.FISH:
            return "\n".join(f"set -gx {name} {shell_word(value)};" for name, value in variables.items())
        case ShellKind.POWERSHELL:
            return "\n".join(f"$Env:{name} = {powershell_word(value)}" for name, value in variables.items())
        case _:
            return "\n".join(f"export {name}={shell_word(value)}" for name, value in variables.items())


def _user_shell() -> ShellKind:
    """The user's shell by ``$SHELL``. ``sh`` stands for every shell that understands ``export``."""
    from gpumesh.config import environment

    program = Path(environment.shell() or "sh").name
    match program:
        case "fish":
            return ShellKind.FISH
        case "pwsh" | "powershell":
            return ShellKind.POWERSHELL
        case _:
            return ShellKind.SH
