"""`gpumesh ui`: opens the gateway's page in a browser. The key is never in the address: the page asks for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.gateway_address import GatewayAddress, find_gateway
from gpumesh.cli.global_options import global_options
from gpumesh.cli.views.page_path import PAGE_PATH
from gpumesh.cli.views.safe_text import clean_line

# The programs that open an address in the user's browser, the most fitting first. wslview: Windows' browser from WSL.
OPENERS = ("wslview", "xdg-open", "gio", "sensible-browser", "x-www-browser")
OPEN_TIMEOUT_S = 3.0  # an opener that fails does so at once; some stay as long as the browser
# A gateway that listens on every interface is reached at one of them.
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - it is replaced here

app = new_app()


@app.command()
def ui(
    ctx: typer.Context,
    only_print: Annotated[bool, typer.Option("--print", help="Print the address, and open nothing.")] = False,
) -> None:
    """Open the gateway's page in a browser: nodes, GPUs, requests, findings, live.

    Without a browser (as on a server), prints the address. If the gateway asks for a key, so does the page: the key is
    in no address and on no command line.
    """
    options = global_options(ctx)
    address = find_gateway(options, must_run=True)
    url = page_url(address.url)
    was_opened = not only_print and _open_browser(url)
    if not was_opened:
        typer.echo(clean_line(url))
    if options.quiet:
        return
    if was_opened:
        typer.echo(clean_line(f"opened {url}"), err=True)
    elif not only_print:
        port = url.removesuffix(PAGE_PATH).rpartition(":")[2]
        forward = f"ssh -L {port}:127.0.0.1:{port} THIS_MACHINE"
        typer.echo(f"no browser can be opened here; to see it from where you sit: {forward}", err=True)
    if address.needs_key:
        typer.echo(clean_line(_describe_key(address)), err=True)


def page_url(gateway_url: str) -> str:
    """The address of the page, as a browser on this machine needs it."""
    for every_interface, loopback in _EVERY_INTERFACE.items():
        gateway_url = gateway_url.replace(f"//{every_interface}:", f"//{loopback}:")
    return f"{gateway_url}{PAGE_PATH}"


def _describe_key(address: GatewayAddress) -> str:
    """Where a person finds the key for the page."""
    variables = " or ".join(f"${name}" for name in address.key_variables)
    source = f": paste the value of {variables}" if variables else ""
    return f"the page asks for the gateway's key{source}"


def _open_browser(url: str) -> bool:
    """Whether a browser was asked to open the address. It gets none of our secrets in its environment."""
    from gpumesh.config import environment

    command = _opener_command()
    if command is None:
        return False
    try:
        process = subprocess.Popen(
            [*command, url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment.child_environment(),
            start_new_session=True,  # Ctrl-C in our terminal does not end the browser
        )
    except OSError:
        return False
    try:
        return process.wait(OPEN_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        process.returncode = 0  # the browser runs on, and nobody waits for it: otherwise Popen would warn
        return True


def _opener_command() -> list[str] | None:
    """The command that opens an address, which follows as its last argument; ``None`` where no window can be opened."""
    from gpumesh.config import environment

    if sys.platform == "darwin":
        return ["open"]
    browser = environment.get("BROWSER")
    if browser is not None and shutil.which(browser):
        return [browser]
    if environment.display() is None and not shutil.which("wslview"):
        return None
    program = next(filter(shutil.which, OPENERS), None)
    if program is None:
        return None
    return [program, "open"] if program == "gio" else [program]
