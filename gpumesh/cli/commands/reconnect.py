"""`gpumesh reconnect NODE`: lets a tunnel connect at once, without the pause before its next attempt."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.open_session import open_session, run_async

app = new_app()


@app.command()
def reconnect(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE", autocompletion=completion.complete_nodes)],
) -> None:
    """Try nodes' tunnels again now: after a pod was started, a key was installed, a cable was plugged in.

    A tunnel that is up is checked, and what runs over it goes on; one that waits or has given up tries at once.
    """
    options = global_options(ctx)

    async def reconnect_nodes() -> None:
        # embed=False: without a running mesh this is an error, for a mesh opened here would end with the command.
        async with open_session(options, embed=False) as session:
            for node in nodes:
                await session.reconnect(node)

    run_async(reconnect_nodes())
