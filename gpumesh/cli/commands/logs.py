"""`gpumesh logs`: shows the log of the mesh, or the log of the gateway's requests; also after the mesh has ended."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from gpumesh.cli import completion
from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.views.logs.lines import format_log_line
from gpumesh.cli.views.logs.selection import LogLevel, LogSelection, parse_since
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError, UsageError, unknown_node

USUAL_LINES = 100  # of the last lines, where nothing else is asked for
POLL_S = 0.2  # between two looks for new lines
END_POLLS = 5  # looks for new lines between two looks for the end of the mesh
MAX_JSON_LINE = 1 << 16  # characters of a line that are printed with --json

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.daemon.run_record import KilledMesh

app = new_app()


@app.command()
def logs(
    ctx: typer.Context,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE]...", help="Only the lines about these nodes.", autocompletion=completion.complete_nodes
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what comes.")] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "--tail", "-n", min=0, help="So many of the last lines; 100, or all with --since."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Only lines after this: 1h, 30m, 2d, 14:30, 2026-11-30T08:00."),
    ] = None,
    level: Annotated[
        LogLevel | None,
        typer.Option("--level", metavar="LEVEL", help="Only lines of this level and above: info, warning, error."),
    ] = None,
    access: Annotated[bool, typer.Option("--access", help="The gateway's requests instead, one a line.")] = False,
    as_json: Annotated[bool, json_option("The lines as they are: JSON objects.")] = False,
) -> None:
    """The mesh's log: every change of state with its reason. It stays after the mesh has ended.

    \b
    Examples:
      gpumesh logs -f
      gpumesh logs iceland --since 1h --level warning
      gpumesh logs -n 1000 --json | jq 'select(.node == "iceland")'
    """
    options = global_options(ctx)
    if access and level is not None:
        raise UsageError("--level belongs to the mesh's own log: requests have no level")
    start = None if since is None else parse_since(since, datetime.now().astimezone())
    selection = LogSelection(frozenset(nodes or ()), start, level)
    paths = options.paths()
    path = paths.access_log if access else paths.log
    max_lines = lines if lines is not None else (None if since is not None else USUAL_LINES)
    hint = "`gpumesh up -d` starts a mesh, which writes it"
    if access and paths.log.exists():
        # The access log is made with the first request. `gpumesh run` does not go through the gateway.
        hint = "a line is written for each request that comes to the gateway"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            _check_names(nodes or (), options, path)
            for line in _last_lines(path, file, selection, max_lines):
                _print_line(line, as_json)
            announce_end = _EndAnnouncement(paths)
            announce_end()
            if follow:
                for line in filter(selection.takes, _follow(path, file, announce_end)):
                    _print_line(line, as_json)
    except FileNotFoundError:
        raise GPUMeshError(f"there is no log yet at {path}", hint=hint) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _last_lines(path: Path, file: TextIO, selection: LogSelection, max_lines: int | None) -> Iterable[str]:
    """The last lines of the selection, ``max_lines`` at most (``None``: all of them), also from older files of the log.
    Reads ``file``, the open file at ``path``, to its end."""
    newest_lines = deque(filter(selection.takes, file), max_lines)
    if max_lines is not None and len(newest_lines) >= max_lines:
        return newest_lines
    all_lines: deque[str] = deque(maxlen=max_lines)
    for older_file in reversed(_older_files(path)):
        # The mesh may rename the file at this moment.
        with suppress(FileNotFoundError), older_file.open(encoding="utf-8", errors="replace") as lines:
            all_lines.extend(filter(selection.takes, lines))
    all_lines.extend(newest_lines)
    return all_lines


def _older_files(path: Path) -> list[Path]:
    """The files that the log's rotation has left, the newest first."""
    files: list[Path] = []
    while (older_file := path.with_name(f"{path.name}.{len(files) + 1}")).exists():
        files.append(older_file)
    return files


def _check_names(names: Sequence[str], options: GlobalOptions, path: Path) -> None:
    """Raises UsageError for a name that neither mesh.yaml nor the log has. The log may have nodes of the past."""
    if not names:
        return
    known_names: dict[str, None] = {}
    with suppress(GPUMeshError):  # the log can be read although mesh.yaml is broken by now
        known_names.update(dict.fromkeys(node.name for node in options.topology().nodes))
    if all(name in known_names for name in names):
        return
    for file in (*reversed(_older_files(path)), path):
        with suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as lines:
            known_names.update(dict.fromkeys(filter(None, map(_node_of, lines))))
    for name in names:
        if name not in known_names:
            raise unknown_node(name, known_names)


def _node_of(line: str) -> str | None:
    """The node that a line of the log is about; ``None`` if it is about none, or has an unknown form."""
    with suppress(ValueError, AttributeError, RecursionError):
        node = json.loads(line).get("node")
        return clean_line(node) if isinstance(node, str) else None
    return None


def _print_line(line: str, as_json: bool) -> None:
    typer.echo(clean_line(line, MAX_JSON_LINE) if as_json else format_log_line(line))


class _EndAnnouncement:
    """Prints once for each mesh that was killed that it was: such a mesh writes no last line."""

    def __init__(self, paths: MeshPaths) -> None:
        self._paths = paths
        self._announced: KilledMesh | None = None

    def __call__(self) -> None:
        """Looks for a killed mesh, and prints a sentence to stderr if there is a new one."""
        from gpumesh.cli.views.killed_mesh import HINT, describe_killed_mesh
        from gpumesh.daemon.run_record import find_killed_mesh

        killed = find_killed_mesh(self._paths)
        if killed is not None and killed != self._announced:
            sys.stdout.flush()  # its lines come before this one
            typer.echo(f"{describe_killed_mesh(killed)} ({HINT})", err=True)
        self._announced = killed


def _follow(path: Path, file: TextIO, announce_end: Callable[[], None]) -> Iterator[str]:
    """Yields new lines until interrupted, also after rotations of the log and restarts of the mesh. ``file`` is the
    open file at ``path``, whose old lines the caller has read. ``announce_end`` is called every ``END_POLLS`` polls."""
    polls = 0
    line = ""
    while True:
        piece = file.readline()  # empty at the end of the file; without "\n" if the line is still being written
        if piece:
            line += piece
            if line.endswith("\n"):
                yield line
                line = ""
        elif _is_replaced(path, file):  # and the old file is read to its end
            file = path.open(encoding="utf-8", errors="replace")  # used by the next iteration
        else:
            _wait_for_poll()
            polls += 1
            if polls % END_POLLS == 0:
                announce_end()


def _wait_for_poll() -> None:
    """Waits until it is time to look for new lines. Raises BrokenPipeError when nobody reads our output any more, as
    after `gpumesh logs -f | head`: while there is no line to write, no write can fail."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, ValueError):
        time.sleep(POLL_S)  # stdout is no real file (in tests)
        return
    poller = select.poll()
    poller.register(output, 0)  # 0 asks for no event, but POLLERR and POLLHUP are always reported
    for _, event in poller.poll(POLL_S * 1000):  # milliseconds
        if event & (select.POLLERR | select.POLLHUP):
            raise BrokenPipeError


def _is_replaced(path: Path, file: TextIO) -> bool:
    """Whether the path leads to another file than the open file. False if it leads to no file: the mesh will make a
    new one."""
    try:
        path_status = path.stat()
    except FileNotFoundError:
        return False
    return path_status.st_ino != os.fstat(file.fileno()).st_ino
