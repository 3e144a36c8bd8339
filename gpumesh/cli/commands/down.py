"""`gpumesh down`: drains and stops the background mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.duration_option import DURATION_METAVAR, duration_parser
from gpumesh.cli.global_options import global_options
from gpumesh.cli.open_session import run_async

if TYPE_CHECKING:
    from gpumesh.state import MeshState

app = new_app()


@app.command()
def down(
    ctx: typer.Context,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar=DURATION_METAVAR,
            parser=duration_parser(0.0),
            show_default="10s",
            help="How long what is in flight may take to end: 30s, 2m, or seconds.",
        ),
    ] = 10.0,
) -> None:
    """Drain and stop the mesh that runs for this configuration.

    Requests that run may end first; after --wait they are cut, with an error that says so. A second `down` may
    make that sooner. It returns when the process is gone. When no mesh runs there is nothing to do, and the exit code
    is 0.
    """
    from gpumesh.daemon.background import stop_background
    from gpumesh.errors import MeshNotRunning

    options = global_options(ctx)
    last_count = 0

    def report_waiting(state: MeshState) -> None:
        """Prints how many requests have not ended, each time when their number has changed."""
        nonlocal last_count
        count = state.gateway.in_flight + state.gateway.queued
        if count > 0 and count != last_count and not options.quiet:
            typer.echo(f"waiting for {count} request{'' if count == 1 else 's'} to end", err=True)
        last_count = count

    try:
        stopped_by_itself = run_async(stop_background(options.paths(), wait, on_state=report_waiting))
    except MeshNotRunning as error:  # what was asked for is so already
        if not options.quiet:
            typer.echo(error.message, err=True)
        return
    if not stopped_by_itself:
        typer.echo("the mesh did not end by itself and was killed; `gpumesh logs` may say why", err=True)
        raise typer.Exit(1)
    if not options.quiet:
        typer.echo("stopped", err=True)
