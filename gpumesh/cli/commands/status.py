"""`gpumesh status`: shows every node and GPU, once or redrawn. To be quick, this file imports no heavy module."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.duration_option import DURATION_METAVAR, duration_parser
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.open_session import open_session, run_async
from gpumesh.cli.output_format import OutputFormat, choose_format, output_option, print_document, print_names
from gpumesh.cli.views.node_selection import SortKey, select_nodes, sort_nodes
from gpumesh.cli.views.safe_text import json_text
from gpumesh.config import environment
from gpumesh.errors import ExitCode
from gpumesh.state import Health, MeshState, Severity

if TYPE_CHECKING:
    from gpumesh.daemon.run_record import KilledMesh
    from gpumesh.mesh.history import History

app = new_app()


@app.command()
def status(
    ctx: typer.Context,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE]...", help="Only these nodes; * and ?.", autocompletion=completion.complete_nodes
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay, and redraw when something changes.")] = False,
    as_json: Annotated[bool, json_option("As JSON (schema gpumesh.status/1).")] = False,
    output: Annotated[OutputFormat | None, output_option()] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 3 if anything is wrong, 4 if no node is up.")] = False,
    node: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            "-n",
            metavar="NODE",
            help="The same as NODE; repeatable.",
            autocompletion=completion.complete_nodes,
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only nodes with this label; repeatable."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            "-s",
            metavar="KEY",
            help=f"One of {', '.join(SortKey)}. Default: trouble for tables, config for all else.",
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            metavar=DURATION_METAVAR,
            parser=duration_parser(0.1),
            show_default="1s",
            help="With --watch: the shortest time between two redraws: 500ms, 2s, or seconds.",
        ),
    ] = 1.0,
) -> None:
    """Every node and GPU: tunnel, memory, load, models, and why something is not well.

    Looks at the running mesh, or probes once if none is running. -v adds the processes on each GPU, what the balancer
    has learned of each node (NEIGHBOUR: how much longer each other answer makes a token take), each node's last
    forecast, and who can use the gateway and the tunnels. With NODE and --label the totals are those of the nodes
    that are shown. In --watch, single key presses drain, resume and reconnect a node, and q leaves.

    \b
    Examples:
      gpumesh status -w
      gpumesh status iceland 'gpu*' -o wide
      gpumesh status --sort free --label site=home
      gpumesh status --json | jq '.totals.vram_free_mib'
      gpumesh status --check --quiet || echo "look at the GPUs"
    """
    options = global_options(ctx)
    names = [*(nodes or ()), *(node or ())]
    chosen_format = choose_format(output, as_json)
    order = parse_sort_key(sort, is_table=chosen_format in (None, OutputFormat.WIDE))
    if watch:
        with _signals_as_interrupt():
            run_async(_watch(options, names, label or [], order, interval, chosen_format))
        return
    state, history = _read_state(options, with_history=chosen_format in (None, OutputFormat.WIDE))
    state = sort_nodes(select_nodes(state, names, label or []), order)
    if chosen_format not in (None, OutputFormat.WIDE):
        _print_as(state, chosen_format)
    # --quiet silences only --check, whose answer is the exit code. The table is the result of a plain `status`.
    elif not (check and options.quiet):
        from gpumesh.cli.views.status.status_view import ViewOptions, print_status

        is_wide = chosen_format == OutputFormat.WIDE
        print_status(state, ViewOptions(verbose=options.verbose, history=history, wide=is_wide))
    exit_code = health_exit_code(state)
    if check and exit_code is not ExitCode.OK:
        raise typer.Exit(int(exit_code))


def parse_sort_key(text: str | None, *, is_table: bool) -> SortKey:
    """The value of ``--sort``. Without the option, a table begins with the unhealthy nodes, and programs get the nodes
    in the order of mesh.yaml. Raises UsageError for an unknown name."""
    from gpumesh.errors import UsageError

    if text is None:
        return SortKey.TROUBLE if is_table else SortKey.CONFIG
    try:
        return SortKey(text)
    except ValueError:
        raise UsageError(f"--sort {text!r} is none of: {', '.join(SortKey)}") from None


def health_exit_code(state: MeshState) -> ExitCode:
    """The exit code of ``--check``: OK (0) when all is well, DEGRADED (3) when the mesh works but something is wrong,
    NO_NODE (4) when no node can serve. A node that a person drains is well, but does not serve."""
    healths = [node.health for node in state.nodes]
    any_node_serves = any(health.is_serving for health in healths)
    if not any_node_serves:
        return ExitCode.NO_NODE
    all_nodes_are_well = all(health in (Health.HEALTHY, Health.DRAINING) for health in healths)
    all_findings_are_remarks = all(finding.severity is Severity.INFO for finding in state.findings)
    return ExitCode.OK if all_nodes_are_well and all_findings_are_remarks else ExitCode.DEGRADED


def _read_state(options: GlobalOptions, *, with_history: bool) -> tuple[MeshState, History]:
    """Returns the state, then the history of the running mesh; an empty history without ``with_history``, and if the
    mesh is of an older version. If no mesh runs, opens a mesh for one probe, which has no history."""
    from gpumesh.cli.views import changed_file
    from gpumesh.daemon.control_socket.quick_status import fetch_history, fetch_status
    from gpumesh.mesh.history import History
    from gpumesh.wire import from_json

    paths = options.paths()
    socket = paths.socket
    status_document = fetch_status(socket)
    if status_document is None:
        from gpumesh.cli.views import killed_mesh
        from gpumesh.daemon.run_record import find_killed_mesh

        killed = find_killed_mesh(paths)
        state = run_async(_probe_once(options, killed))
        return killed_mesh.add_finding(state, killed), History()
    state = changed_file.add_finding(from_json(MeshState, status_document), changed_file.watch_running_file(paths))
    history_document = fetch_history(socket) if with_history else None
    history = History() if history_document is None else from_json(History, history_document)
    return state, history


async def _probe_once(options: GlobalOptions, killed: KilledMesh | None) -> MeshState:
    """Opens a mesh in this process, returns its first report, and closes the mesh. ``killed``: the mesh that should
    run, if it was killed."""
    async with open_session(options) as session:
        if not options.quiet and sys.stderr.isatty():
            reason = "no mesh is running" if killed is None else "the mesh was killed or has crashed"
            typer.echo(f"{reason}: probing once …", err=True)
        return await session.wait_first_report(FIRST_REPORT_TIMEOUT_S)


async def _watch(
    options: GlobalOptions,
    names: list[str],
    labels: list[str],
    sort: SortKey,
    interval: float,
    chosen_format: str | None,
) -> None:
    """Shows the state after each change, until interrupted: as a live table on a terminal, else as one table, one line
    of JSON, or one document of YAML after the other. ``interval``: the least seconds between two states."""
    from gpumesh.cli.views.changed_file import watch_with_file
    from gpumesh.cli.views.killed_mesh import print_killed_mesh
    from gpumesh.cli.views.live.live_table import LiveTable
    from gpumesh.cli.views.node_selection import ViewSelection
    from gpumesh.cli.views.status.status_view import ViewOptions, print_status
    from gpumesh.event_loop.async_iterators import closing_iterator

    if not options.quiet:
        print_killed_mesh(options.paths(), then="the nodes are probed by this command itself")
    view = ViewSelection(names, labels, sort, options.verbose)
    async with (
        open_session(options, announce_change=False) as session,
        closing_iterator(watch_with_file(session, options.paths(), interval)) as states,
    ):
        on_terminal = sys.stdout.isatty() and not environment.dumb_terminal()
        if on_terminal and chosen_format is None:
            await LiveTable(session, view, footer="Ctrl-C leaves").run(states)
            return
        async for state in states:
            shown_state = view.apply(state)
            if chosen_format == OutputFormat.JSON:
                typer.echo(json_text(_status_document(shown_state)))
            elif chosen_format in (None, OutputFormat.WIDE):
                is_wide = chosen_format == OutputFormat.WIDE
                print_status(shown_state, ViewOptions(verbose=options.verbose, wide=is_wide))
            else:
                if chosen_format == OutputFormat.YAML:
                    typer.echo("---")  # begins a new document
                _print_as(shown_state, chosen_format)
            sys.stdout.flush()


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into a Ctrl-C while the context is open, so that the terminal is restored. At the end of
    the context the signal itself ends the process."""
    received_signals: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received_signals.append(number)
        signal.raise_signal(signal.SIGINT)

    previous_handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        if received_signals:
            os.kill(os.getpid(), received_signals[0])


def _print_as(state: MeshState, chosen_format: str) -> None:
    """Prints the state as JSON or YAML, or the names of its nodes."""
    if chosen_format == OutputFormat.NAME:
        print_names(node.name for node in state.nodes)
    else:
        print_document(_status_document(state), chosen_format)


def _status_document(state: MeshState) -> dict[str, object]:
    """The document of ``status --json``, of the schema ``gpumesh.status/1``."""
    from gpumesh.wire import status_json

    return status_json(state)
