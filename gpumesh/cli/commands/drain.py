"""`gpumesh drain NODE`: gives a node of the running mesh no new work."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.open_session import open_session, run_async

app = new_app()


@app.command()
def drain(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE", autocompletion=completion.complete_nodes)],
) -> None:
    """Give nodes of the running mesh no new work; what runs there ends by itself. `gpumesh resume` takes it back.

    \b
    Example:
      gpumesh drain iceland && gpumesh status -n iceland -w
    """
    options = global_options(ctx)

    async def drain_nodes() -> None:
        # embed=False: without a running mesh this is an error, for a mesh opened here would end with the command.
        async with open_session(options, embed=False) as session:
            for node in nodes:
                await session.drain(node)

    run_async(drain_nodes())
