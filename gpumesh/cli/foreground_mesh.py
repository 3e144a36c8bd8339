"""Shows a mesh that runs in this process until it is asked to stop: as a live table on a terminal, elsewhere as lines.

For `up` without `-d`, and for `demo --keep`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import typer

from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.config import environment
from gpumesh.event_loop.async_iterators import closing_iterator

if TYPE_CHECKING:
    from gpumesh.cli.global_options import GlobalOptions
    from gpumesh.daemon.sessions.local_session import LocalSession
    from gpumesh.daemon.shutdown import Shutdown
    from gpumesh.state import MeshState

T = TypeVar("T")

REDRAW_S = 0.5  # between two looks at the mesh's state


async def show_mesh(
    session: LocalSession, stop: Shutdown, options: GlobalOptions, *, notes: Sequence[str] = ()
) -> None:
    """Shows the mesh until ``stop`` is requested. On a terminal it shows the live table with ``notes`` below. Elsewhere
    it prints ``notes``, the first report, and then a line for each change. With ``--quiet`` it prints only
    ``notes``."""
    on_terminal = sys.stdout.isatty() and not environment.dumb_terminal()
    if on_terminal and not options.quiet:
        await _show_live_table(session, stop, options, notes)
        return
    for line in notes:
        typer.echo(line)
    sys.stdout.flush()
    if options.quiet:
        await stop.wait()
    else:
        await _print_changes(session, stop)


async def _show_live_table(session: LocalSession, stop: Shutdown, options: GlobalOptions, notes: Sequence[str]) -> None:
    """Shows the live table, and after its end the last state as an ordinary table."""
    from gpumesh.cli.views.live.live_table import LiveTable
    from gpumesh.cli.views.node_selection import SortKey, ViewSelection, sort_nodes
    from gpumesh.cli.views.status.status_view import ViewOptions, print_status

    view = ViewSelection(verbose=options.verbose)
    table = LiveTable(session, view, footer="Ctrl-C ends it", notes=notes, quit_question="stop the mesh? y/n")
    last_state = await table.run(until_stopped(session.watch(REDRAW_S), stop))
    stop.request()  # the key q, and y as the answer, end the table; the mesh is to end with it
    if last_state is not None:
        print_status(sort_nodes(last_state, SortKey.TROUBLE), ViewOptions(verbose=options.verbose))


async def _print_changes(session: LocalSession, stop: Shutdown) -> None:
    """Prints the first report to stdout, and then a line to stderr for each change, until ``stop`` is requested."""
    from gpumesh.cli.views.node_selection import SortKey, sort_nodes
    from gpumesh.cli.views.safe_text import clean_line
    from gpumesh.cli.views.status.status_view import print_status
    from gpumesh.daemon.state_changes import compare_states

    last_state: MeshState | None = None
    async for state in until_stopped(_first_report(session), stop):
        last_state = state
        print_status(sort_nodes(state, SortKey.TROUBLE))
        sys.stdout.flush()
    async for state in until_stopped(session.watch(REDRAW_S), stop):
        for event in compare_states(last_state, state):
            typer.echo(clean_line(f"{state.at:%H:%M:%S} {event.node or ''} {event.message}"), err=True)
        last_state = state


async def _first_report(session: LocalSession) -> AsyncGenerator[MeshState]:
    """Yields one state: the first in which every node is known, or the state after ``FIRST_REPORT_TIMEOUT_S``."""
    yield await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)


async def until_stopped(items: AsyncIterator[T], stop: Shutdown) -> AsyncGenerator[T]:
    """Yields the items until ``stop`` is requested. A request also ends the waiting for the next item."""
    stop_request = asyncio.ensure_future(stop.wait())
    try:
        async with closing_iterator(items):
            while True:
                next_item = asyncio.ensure_future(anext(items))
                try:
                    await asyncio.wait({next_item, stop_request}, return_when=asyncio.FIRST_COMPLETED)
                    if stop_request.done():
                        return
                    try:
                        item = next_item.result()
                    except StopAsyncIteration:  # there are no more items
                        return
                finally:
                    next_item.cancel()  # does nothing if the item has come
                    await asyncio.gather(next_item, return_exceptions=True)
                yield item
    finally:
        stop_request.cancel()
