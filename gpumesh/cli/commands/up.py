"""`gpumesh up`: runs the mesh here with a live table, or starts it in the background and waits for its first report."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.first_report import FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.foreground_mesh import show_mesh
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.open_session import run_async
from gpumesh.errors import ExitCode, GPUMeshError

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.daemon.up_options import UpOptions

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

    Shows a live table until Ctrl-C, which lets what is in flight end, and closes everything. So does the key q, which
    asks first. A second Ctrl-C tells the clients that still wait why they get no more; a third ends it at once. With -d
    it goes on in the background: `gpumesh status` looks at it, `gpumesh down` ends it. The exit code is then 4 if no
    node can serve yet; the mesh runs on nevertheless.

    \b
    Examples:
      gpumesh up
      gpumesh up -d --listen 127.0.0.1:0
      gpumesh up iceland vengeance
    """
    from gpumesh.daemon.up_options import UpOptions

    up_options = UpOptions(nodes=tuple(nodes or ()), gateway=not no_gateway, listen=listen)
    options = global_options(ctx)
    if detach:
        _run_in_background(options, up_options)
    else:
        from gpumesh.daemon.process import async_runner

        try:
            interrupted = async_runner.run(_run_in_foreground(options, up_options))
        except (KeyboardInterrupt, asyncio.CancelledError):  # CancelledError: the third signal came
            interrupted = True
        if interrupted:
            raise typer.Exit(130)


def _run_in_background(options: GlobalOptions, up_options: UpOptions) -> None:
    """Starts the background mesh, waits at most ``FIRST_REPORT_TIMEOUT_S`` for the first report of all nodes, and
    prints it. Exits with 4 if no node can serve then, so that a script does not go on without GPUs."""
    from gpumesh.cli.views.node_selection import SortKey, sort_nodes
    from gpumesh.cli.views.page_path import page_note
    from gpumesh.cli.views.status.status_view import ViewOptions, print_status
    from gpumesh.daemon.background import start_background
    from gpumesh.daemon.control_socket.quick_status import fetch_status
    from gpumesh.daemon.control_socket.remote_session import RemoteSession
    from gpumesh.daemon.up_options import apply_options

    apply_options(options.topology(), up_options)  # only to report problems on this terminal
    paths = options.paths()
    with _explain_if_already_running(paths):
        pid = start_background(paths, up_options)
    if not options.quiet:
        # These lines come before the first report, which may wait for a host that hangs. So a person who presses Ctrl-C
        # meanwhile knows that the mesh runs.
        status = fetch_status(paths.socket) or {}  # empty: the mesh did not answer in time
        gateway = status.get("gateway") or {}
        url = gateway.get("url") or ""
        serving_text = f", serving {url}{page_note(url)}" if url else ""
        typer.echo(f"runs in the background (pid {pid}){serving_text}; `gpumesh down` stops it", err=True)
        _warn_if_open(gateway)
    state = run_async(RemoteSession(paths.socket).wait_first_report(FIRST_REPORT_TIMEOUT_S))
    if not options.quiet:
        print_status(sort_nodes(state, SortKey.TROUBLE), ViewOptions(verbose=options.verbose))
    if not state.totals.nodes_up:
        typer.echo("no node can serve yet; the mesh runs on, and tries again", err=True)
        raise typer.Exit(int(ExitCode.NO_NODE))


async def _run_in_foreground(options: GlobalOptions, up_options: UpOptions) -> bool:
    """Runs the mesh until it is asked to stop. Returns True when a second signal interrupted the draining."""
    from gpumesh.config.changed_file import read_snapshot
    from gpumesh.daemon.mesh_lock import MeshLock
    from gpumesh.daemon.mesh_process import run_mesh
    from gpumesh.daemon.reload.hangup import hangup_means_reload, reload_at_hangup
    from gpumesh.daemon.shutdown import STOP_SIGNALS, STOP_SIGNALS_WITHOUT_HANGUP, Shutdown, handle_signals
    from gpumesh.daemon.up_options import apply_options

    paths = options.paths()
    snapshot = read_snapshot(options.config_file())
    topology = apply_options(snapshot.topology, up_options)
    with _explain_if_already_running(paths):
        lock = MeshLock.acquire(paths)  # held until this process ends
    stop = Shutdown()
    reloads_at_hangup = hangup_means_reload()
    handle_signals(stop, STOP_SIGNALS_WITHOUT_HANGUP if reloads_at_hangup else STOP_SIGNALS)
    running = run_mesh(
        topology,
        paths,
        gateway=up_options.gateway,
        shutdown=stop,
        lock=lock,
        snapshot=snapshot,
        options=up_options,
    )
    async with running as session:
        if reloads_at_hangup and session.file is not None:
            reload_at_hangup(session.file.request)
        try:
            if not options.quiet:
                _warn_if_open(asdict(session.mesh.snapshot().gateway))
            await show_mesh(session, stop, options)
            if not options.quiet:
                typer.echo("closing; Ctrl-C once more does not wait for what is in flight", err=True)
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the terminal was closed
                raise
            stop.request()  # as after Ctrl-C: requests in flight may still end
    return stop.interrupted


@contextmanager
def _explain_if_already_running(paths: MeshPaths) -> Iterator[None]:
    """If the block raises the error that a mesh of this file runs already, adds to the error what was changed in
    mesh.yaml. A person who has just edited the file expects that `up` applies the change."""
    from gpumesh.cli.views.changed_file import watch_running_file
    from gpumesh.errors import MeshAlreadyRunning

    try:
        yield
    except GPUMeshError as error:
        # The error of the background process comes over a pipe, with its code and without its type.
        finding = watch_running_file(paths).find() if error.code == MeshAlreadyRunning.code else None
        if finding is None:
            raise
        raise MeshAlreadyRunning(f"{error.message}; {finding.message}", hint=finding.hint) from error


def _warn_if_open(gateway: Mapping[str, Any]) -> None:
    """Prints a warning if every user of this machine can use the gateway. ``gateway``: the mapping ``gateway`` of
    `status --json`."""
    from gpumesh.cli.views.local_access import OPEN_GATEWAY
    from gpumesh.cli.views.safe_text import clean_line
    from gpumesh.state import LocalAccess

    if gateway.get("access") == LocalAccess.ANY_USER:
        typer.echo(f"{clean_line(str(gateway.get('url')))}: {OPEN_GATEWAY}", err=True)
