"""`gpumesh up`: the mesh, in the foreground with a live table or in the background."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gpumesh.cli import completion
from gpumesh.cli.context import GlobalOptions, global_options, run_async
from gpumesh.cli.lazy import new_app
from gpumesh.config import environment

if TYPE_CHECKING:
    from gpumesh.daemon.local_session import LocalSession
    from gpumesh.daemon.mesh_process import Shutdown, UpOptions
    from gpumesh.state import MeshState

T = TypeVar("T")

FIRST_REPORT_TIMEOUT_S = 7.0  # a connect's own deadline and a probe: what is not known by then is shown as not known
REDRAW_S = 0.5

app = new_app()


@app.command()
def up(
    ctx: typer.Context,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NODE", help="Only these nodes.", autocompletion=completion.complete_nodes),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="Tunnels only, no endpoint.")] = False,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the gateway listens, instead of mesh.yaml's: HOST:PORT, unix:PATH, or HOST:PORT,unix:PATH.",
        ),
    ] = None,
) -> None:
    """Open the tunnels, side by side, start the gateway, and watch over both.

    Shows a live table until Ctrl-C, which lets what is in flight end, and closes everything. A second Ctrl-C tells the
    clients that still wait why they get no more; a third ends it at once. With -d it goes on in
    the background: `gpumesh status` looks at it, `gpumesh down` ends it.

    \b
    Examples:
      gpumesh up
      gpumesh up -d --listen 127.0.0.1:0
      gpumesh up iceland vengeance
    """
    from gpumesh.daemon.mesh_process import UpOptions

    options = UpOptions(tuple(nodes or ()), not no_gateway, listen)
    chosen = global_options(ctx)
    if detach:
        _background(chosen, options)
    else:
        from gpumesh.daemon.process import event_loop

        try:
            interrupted = event_loop.run(_foreground(chosen, options))
        except (KeyboardInterrupt, asyncio.CancelledError):  # the latter: a third signal
            interrupted = True
        if interrupted:
            raise typer.Exit(130)


def _background(chosen: GlobalOptions, options: UpOptions) -> None:
    from gpumesh.cli.views.status_table import ViewOptions, print_status
    from gpumesh.daemon.background import start_background
    from gpumesh.daemon.mesh_process import apply_options
    from gpumesh.daemon.quick_status import fetch_status
    from gpumesh.daemon.remote_session import RemoteSession

    apply_options(chosen.topology(), options)  # what is wrong is said here, with this terminal's width and colours
    paths = chosen.paths()
    pid = start_background(paths, options)
    if not chosen.quiet:
        # Before the report, for which a host that hangs lets us wait: whoever ends the waiting knows that it runs.
        gateway = (fetch_status(paths.socket) or {}).get("gateway") or {}
        where = f", serving {gateway['url']}" if gateway.get("url") else ""
        typer.echo(f"runs in the background (pid {pid}){where}; `gpumesh down` stops it", err=True)
        _say_if_open(gateway)
    state = run_async(RemoteSession(paths.socket).wait_first_report(FIRST_REPORT_TIMEOUT_S))
    if not chosen.quiet:
        print_status(state, ViewOptions(verbose=chosen.verbose))


async def _foreground(chosen: GlobalOptions, options: UpOptions) -> bool:
    """Whether a person pressed Ctrl-C twice."""
    from gpumesh.daemon.lock import MeshLock
    from gpumesh.daemon.mesh_process import Shutdown, apply_options, run_mesh
    from gpumesh.daemon.signals import handle_signals

    paths = chosen.paths()
    topology = apply_options(chosen.topology(), options)
    lock = MeshLock.acquire(paths)  # held until this process ends
    stop = Shutdown()
    handle_signals(stop)
    async with run_mesh(topology, paths, gateway=options.gateway, shutdown=stop, lock=lock) as session:
        try:
            if not chosen.quiet:
                _say_if_open(asdict(session.mesh.snapshot().gateway))
            await show_mesh(session, stop, chosen)
            if not chosen.quiet:
                typer.echo("closing; Ctrl-C once more does not wait for what is in flight", err=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            stop.request()  # the terminal was closed: nobody is there to be told, but what is in flight may still end
    return stop.interrupted


def _say_if_open(gateway: Mapping[str, Any]) -> None:
    """As `status --json` has it."""
    from gpumesh.cli.text import clean_line
    from gpumesh.cli.views.local_access import OPEN_GATEWAY
    from gpumesh.state import LocalAccess

    if gateway.get("access") == LocalAccess.ANY_USER:
        typer.echo(f"{clean_line(str(gateway.get('url')))}: {OPEN_GATEWAY}", err=True)


async def show_mesh(session: LocalSession, stop: Shutdown, chosen: GlobalOptions, *, notes: Sequence[str] = ()) -> None:
    """Until ``stop``: the live table on a terminal; elsewhere the first report, then a line for each change. ``notes``
    is said under the table, which takes the whole screen, and elsewhere before all else."""
    live = not chosen.quiet and sys.stdout.isatty() and not environment.dumb_terminal()
    if not live:
        for line in notes:
            typer.echo(line)
        sys.stdout.flush()
    if chosen.quiet:
        await stop.wait()
    elif live:
        from gpumesh.cli.views.live_table import LiveTable, ViewSelection
        from gpumesh.cli.views.status_table import ViewOptions, print_status

        table = LiveTable(session, ViewSelection(verbose=chosen.verbose), footer="Ctrl-C ends it", notes=notes)
        last = await table.run(until_stopped(session.watch(REDRAW_S), stop))
        stop.request()
        if last is not None:
            print_status(last, ViewOptions(verbose=chosen.verbose))
    else:
        await _tell_changes(session, stop)


async def _tell_changes(session: LocalSession, stop: Shutdown) -> None:
    from gpumesh.cli.text import clean_line
    from gpumesh.cli.views.status_table import print_status
    from gpumesh.daemon import event_log

    reports = until_stopped(_once(session), stop)
    last: MeshState | None = None
    async for state in reports:
        last = state
        print_status(state)
        sys.stdout.flush()
    async for state in until_stopped(session.watch(REDRAW_S), stop):
        for event in event_log.compare_states(last, state):
            typer.echo(clean_line(f"{state.at:%H:%M:%S} {event.node or ''} {event.message}"), err=True)
        last = state


async def _once(session: LocalSession) -> AsyncGenerator[MeshState]:
    yield await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)


async def until_stopped(items: AsyncIterator[T], stop: Shutdown) -> AsyncGenerator[T]:
    """The items, as long as nobody asked to stop; ends in the middle of waiting for one."""
    from gpumesh.daemon.async_generators import closing_iterator

    stopped = asyncio.ensure_future(stop.wait())
    try:
        async with closing_iterator(items):
            while True:
                following = asyncio.ensure_future(anext(items))
                try:
                    await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    if stopped.done():
                        return
                    try:
                        item = following.result()
                    except StopAsyncIteration:
                        return
                finally:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                yield item
    finally:
        stopped.cancel()
