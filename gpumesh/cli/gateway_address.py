"""Finds the address of the gateway, for the commands that hand it to other programs (`env`, `ui`)."""

from __future__ import annotations

from typing import NamedTuple

import typer

from gpumesh.cli.global_options import GlobalOptions
from gpumesh.config.listen_address import UNIX_PREFIX
from gpumesh.errors import MeshNotRunning, UsageError
from gpumesh.state import LocalAccess
from gpumesh.text.quoting import paste_command, yaml_text


class GatewayAddress(NamedTuple):
    """Where clients reach the gateway. ``key_variables`` are the variables that mesh.yaml names for clients' keys."""

    url: str
    needs_key: bool
    key_variables: tuple[str, ...]


def find_gateway(options: GlobalOptions, *, must_run: bool = False) -> GatewayAddress:
    """The gateway of the running mesh, whose port may be any free port; if no mesh runs, that of mesh.yaml.

    Raises MeshNotRunning if the running mesh has no gateway, or if no mesh runs and either ``must_run`` is set or
    mesh.yaml gives no port. Raises UsageError if there is only a Unix socket."""
    from gpumesh.cli.views import changed_file
    from gpumesh.daemon.control_socket.quick_status import fetch_status

    paths = options.paths()
    status = fetch_status(paths.socket)
    if status is not None:
        if not options.quiet:
            changed_file.print_finding(changed_file.watch_running_file(paths).find())
        gateway = status.get("gateway", {})
        url = gateway.get("url")
        if not isinstance(url, str):
            raise MeshNotRunning("the running mesh has no gateway", hint="`gpumesh down`, then `gpumesh up -d`")
        if url.startswith(UNIX_PREFIX):
            raise _unix_only_error(url)
        needs_key = gateway.get("access") == LocalAccess.KEY
        return GatewayAddress(url, needs_key, options.topology().gateway.key_variables if needs_key else ())
    if must_run:
        raise MeshNotRunning("no mesh is running for this configuration")
    spec = options.topology().gateway
    if spec.host is None:
        raise _unix_only_error(f"{UNIX_PREFIX}{spec.socket}")
    if spec.port == 0:  # any free port, which the system chooses at the start
        raise MeshNotRunning("no mesh is running, and mesh.yaml lets the gateway take any port")
    if not options.quiet:
        typer.echo("no mesh is running now: `gpumesh up -d` starts it", err=True)
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    return GatewayAddress(f"http://{host}:{spec.port}", spec.needs_key, spec.key_variables)


def _unix_only_error(address: str) -> UsageError:
    """The error for a gateway that has no TCP port: neither a variable nor a browser can name its Unix socket.
    ``address``: with or without ``unix:``."""
    path = address.removeprefix(UNIX_PREFIX)
    listen_setting = f"`gateway: {{listen: [127.0.0.1:11430, {yaml_text(UNIX_PREFIX + path)}]}}`"
    curl_command = paste_command("curl --unix-socket {PATH} http://localhost/api/tags", PATH=path)
    return UsageError(
        f"the gateway listens on the Unix socket {path} alone, which these variables cannot name",
        hint=f"add a port, {listen_setting}, or take a program that can use a socket: {curl_command}",
    )
