"""`gpumesh env`: prints the environment variables that make other programs use the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import MeshNotRunning, UsageError
from gpumesh.quoting import paste_command, powershell_word, shell_word, yaml_text

app = new_app()


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
    typer.echo(export_lines(client_variables(_gateway_url(global_options(ctx))), shell or _user_shell()))


def client_variables(url: str) -> dict[str, str]:
    """The variables that clients read, by name, with the gateway's base URL as each client expects it.

    The variables of keys are left out: on loopback the gateway usually needs no key, and a key that the user has set
    must stay as it is."""
    return {"OLLAMA_HOST": url, "OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url}


def export_lines(variables: Mapping[str, str], shell: ShellKind) -> str:
    """The commands that set and export the variables in this shell, a line for each."""
    match shell:
        case ShellKind.FISH:
            return "\n".join(f"set -gx {name} {shell_word(value)};" for name, value in variables.items())
        case ShellKind.POWERSHELL:
            return "\n".join(f"$Env:{name} = {powershell_word(value)}" for name, value in variables.items())
        case _:
            return "\n".join(f"export {name}={shell_word(value)}" for name, value in variables.items())


def _gateway_url(options: GlobalOptions) -> str:
    """The gateway's URL: that of the running mesh, whose port may be any free port; if no mesh runs, the URL that
    mesh.yaml gives.

    Raises MeshNotRunning if the running mesh has no gateway, or if no mesh runs and mesh.yaml gives no port. Raises
    UsageError if there is only a Unix socket."""
    from gpumesh.cli.views import changed_file
    from gpumesh.daemon.control_socket.quick_status import fetch_status

    paths = options.paths()
    status = fetch_status(paths.socket)
    if status is not None:
        if not options.quiet:
            changed_file.print_finding(changed_file.watch_running_file(paths).find())
        url = status.get("gateway", {}).get("url")
        if not isinstance(url, str):
            raise MeshNotRunning("the running mesh has no gateway", hint="`gpumesh down`, then `gpumesh up -d`")
        if url.startswith(UNIX_PREFIX):
            raise _unix_only_error(url)
        return url
    spec = options.topology().gateway
    if spec.host is None:
        raise _unix_only_error(f"{UNIX_PREFIX}{spec.socket}")
    if spec.port == 0:  # any free port, which the system chooses at the start
        raise MeshNotRunning("no mesh is running, and mesh.yaml lets the gateway take any port")
    if not options.quiet:
        typer.echo("no mesh is running now: `gpumesh up -d` starts it", err=True)
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    return f"http://{host}:{spec.port}"


def _unix_only_error(address: str) -> UsageError:
    """The error for a gateway that has no TCP port, because no variable can name its Unix socket. ``address``: with or
    without ``unix:``."""
    path = address.removeprefix(UNIX_PREFIX)
    listen_setting = f"`gateway: {{listen: [127.0.0.1:11430, {yaml_text(UNIX_PREFIX + path)}]}}`"
    curl_command = paste_command("curl --unix-socket {PATH} http://localhost/api/tags", PATH=path)
    return UsageError(
        f"the gateway listens on the Unix socket {path} alone, which these variables cannot name",
        hint=f"add a port, {listen_setting}, or take a program that can use a socket: {curl_command}",
    )


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
