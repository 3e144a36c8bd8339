"""`gpumesh resume NODE`: gives a drained node work again."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.open_session import open_session, run_async

app = new_app()


@app.command()
def resume(
    ctx: typer.Context,
    nodes: Annotated[list[str], typer.Argument(metavar="NODE", autocompletion=completion.complete_nodes)],
) -> None:
    """Give drained nodes of the running mesh work again."""
    options = global_options(ctx)

    async def resume_nodes() -> None:
        # embed=False: without a running mesh this is an error, for a mesh opened here would end with the command.
        async with open_session(options, embed=False) as session:
            for node in nodes:
                await session.resume(node)

    run_async(resume_nodes())
