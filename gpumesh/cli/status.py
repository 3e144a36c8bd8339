"""`gpumesh status`: what people look at all day. On a running mesh it must be quick, so nothing heavy is imported."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gpumesh.cli.context import Settings, open_session, run, settings
from gpumesh.cli.lazy import new_app
from gpumesh.cli.text import json_text
from gpumesh.errors import ExitCode
from gpumesh.state import Health, MeshState, Severity

REPORT_S = 9.0

app = new_app()


@app.command()
def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and redraw when something changes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON (schema gpumesh.status/1).")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 3 if anything is wrong, 4 if no node is up.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="With --watch: redraw at most so often.")
    ] = 1.0,
) -> None:
    """Every node and GPU: tunnel, memory, load, models, and why something is not well.

    Looks at the running mesh, or probes once if none is running. -v adds the processes on each GPU.

    \b
    Examples:
      gpumesh status -w
      gpumesh status --json | jq '.totals.vram_free_mib'
      gpumesh status --check --quiet || echo "look at the GPUs"
    """
    chosen = settings(ctx)
    if watch:
        run(_watch(chosen, interval, as_json=as_json))
        return
    state = _now(chosen)
    if as_json:
        typer.echo(json_text(_document(state), indent=2))
    elif not (check and chosen.quiet):
        from gpumesh.cli import render

        render.print_status(state, verbose=chosen.verbose)
    if check and (code := check_code(state)):
        raise typer.Exit(int(code))


def check_code(state: MeshState) -> ExitCode:
    """Whether the mesh is as it should be: 0, 3 (works, but something is wrong), 4 (no node can serve)."""
    healths = [node.health for node in state.nodes]
    if not any(health in (Health.HEALTHY, Health.DEGRADED) for health in healths):
        return ExitCode.NO_NODE
    well = all(health in (Health.HEALTHY, Health.DRAINING) for health in healths)
    if well and all(finding.severity is Severity.INFO for finding in state.findings):
        return ExitCode.OK
    return ExitCode.DEGRADED


def _now(chosen: Settings) -> MeshState:
    from gpumesh.daemon.glance import glance
    from gpumesh.wire import from_json

    seen = glance(chosen.paths().socket)
    if seen is not None:
        return from_json(MeshState, seen)
    return run(_probe(chosen))


async def _probe(chosen: Settings) -> MeshState:
    async with open_session(chosen) as session:
        if not chosen.quiet and sys.stderr.isatty():
            typer.echo("no mesh is running: probing once …", err=True)
        return await session.first_report(REPORT_S)


async def _watch(chosen: Settings, interval: float, *, as_json: bool) -> None:
    from gpumesh.cli import render

    async with open_session(chosen) as session:
        states = session.watch(interval)
        if as_json:
            async for state in states:
                typer.echo(json_text(_document(state)))
        elif sys.stdout.isatty():
            await render.show_live(states, verbose=chosen.verbose, footer="Ctrl-C leaves")
        else:
            async for state in states:
                render.print_status(state, verbose=chosen.verbose)


def _document(state: MeshState) -> dict[str, object]:
    from gpumesh.wire import status_json

    return status_json(state)
