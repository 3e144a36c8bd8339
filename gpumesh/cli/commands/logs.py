"""`gpumesh logs`: shows the log of the mesh, or the log of the gateway's requests; also after the mesh has ended."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import global_options
from gpumesh.cli.json_output import json_option
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.errors import GPUMeshError

POLL_S = 0.2  # between two looks for new lines
MAX_JSON_LINE = 1 << 16  # characters of a line that are printed with --json

app = new_app()


@app.command()
def logs(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and show what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="So many of the last lines.")] = 100,
    access: Annotated[bool, typer.Option("--access", help="The gateway's requests instead, one a line.")] = False,
    as_json: Annotated[bool, json_option("The lines as they are: JSON objects.")] = False,
) -> None:
    """The mesh's log: every change of state with its reason. It stays after the mesh has ended.

    \b
    Examples:
      gpumesh logs -f
      gpumesh logs -n 1000 --json | jq 'select(.node == "iceland")'
    """
    paths = global_options(ctx).paths()
    path = paths.access_log if access else paths.log
    hint = "`gpumesh up -d` starts a mesh, which writes it"
    if access and paths.log.exists():
        # The access log is made with the first request. `gpumesh run` does not go through the gateway.
        hint = "a line is written for each request that comes to the gateway"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in deque(file, lines):  # reads the whole file, and keeps the last lines
                _print_line(line, as_json)
            if follow:
                for line in _follow(path, file):
                    _print_line(line, as_json)
    except FileNotFoundError:
        raise GPUMeshError(f"there is no log yet at {path}", hint=hint) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_line(line: str, as_json: bool) -> None:
    typer.echo(clean_line(line, MAX_JSON_LINE) if as_json else format_log_line(line))


def format_log_line(line: str) -> str:
    """A line of the log, or of the access log, in the form for a person. A line of unknown form is only made safe for a
    terminal."""
    try:
        entry = json.loads(line)
        if "path" in entry:  # a line of the access log
            return clean_line(_format_request(entry))
        return _format_event(entry)
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, or JSON without the keys that we expect
        return clean_line(line)


def _format_event(entry: dict[str, Any]) -> str:
    """An entry of the log: its time, level, node and message, and on further lines the traceback, if it has one. Raises
    KeyError, TypeError or ValueError for an entry of another form."""
    parts = (
        _local_time(str(entry["at"])),
        f"{clean_line(str(entry['level'])):<7}",
        f"{clean_line(str(entry.get('node') or '-')):<12}",
        clean_line(str(entry["message"])),
    )
    text = "  ".join(parts)
    trace = entry.get("trace")
    return f"{text}\n{clean_text(trace).rstrip()}" if isinstance(trace, str) else text


def _format_request(entry: dict[str, Any]) -> str:
    """An entry of the access log: the time, the client, the request, the result, and those durations and names that the
    entry has. Raises KeyError, TypeError or ValueError for an entry of another form."""
    parts = [
        _local_time(str(entry["at"])),
        str(entry.get("client") or "-"),
        f"{entry['method']} {entry['path']}",
        str(entry.get("status") or "-"),
        str(entry.get("outcome")),
        f"{entry['total_ms']:.0f} ms",
    ]
    for key, label, unit in (("ttft_ms", "ttft", " ms"), ("queue_ms", "queue", " ms"), ("attempts", "attempts", "")):
        if entry.get(key):
            parts.append(f"{label} {entry[key]:.0f}{unit}")
    parts += [str(entry[key]) for key in ("model", "node", "id") if entry.get(key)]
    return "  ".join(parts)


def _local_time(at: str) -> str:
    """A time of the log, which is UTC in ISO 8601, in the local time zone. Raises ValueError for any other text."""
    return f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M:%S}"


def _follow(path: Path, file: TextIO) -> Iterator[str]:
    """Yields new lines until interrupted, also after rotations of the log and restarts of the mesh. ``file`` is the
    open file at ``path``, whose old lines the caller has read."""
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
