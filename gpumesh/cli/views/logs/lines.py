"""Formats lines of the mesh's log and of the log of requests for a person. Pure; no rich."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from gpumesh.cli.views.safe_text import clean_line, clean_text


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
