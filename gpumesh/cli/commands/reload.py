"""`gpumesh reload`: lets the running mesh take over what mesh.yaml says now."""

from __future__ import annotations

from typing import Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_session, run_async

app = new_app()

RELOAD_SCHEMA = "gpumesh.reload/1"


@app.command()
def reload(
    ctx: typer.Context,
    as_json: Annotated[bool, json_option("As JSON: gpumesh.reload/1.")] = False,
) -> None:
    """Let the running mesh read mesh.yaml again, and say what has changed.

    What is in flight ends where it is. A mesh does this by itself when the file was saved, unless it says
    `gateway: {reload: manual}`. A file with errors changes nothing; the errors are printed, with exit code 2.

    \b
    Example:
      gpumesh config check && gpumesh reload
    """
    from gpumesh.cli.json_output import print_json
    from gpumesh.cli.views.reload_report import print_report
    from gpumesh.wire import to_json

    options = global_options(ctx)

    async def reload_mesh() -> None:
        # embed=False: without a running mesh this is an error, for there is nothing that could take the file over.
        async with open_session(options, embed=False, announce_change=False) as session:
            report = await session.reload()
        if as_json:
            print_json({"schema": RELOAD_SCHEMA, **to_json(report)})
        elif not options.quiet:
            print_report(report)

    run_async(reload_mesh())
