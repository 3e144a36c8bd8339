"""Which lines of the mesh's log are shown: those of some nodes, since a time, from a level on. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from gpumesh.errors import UsageError

_DURATION_PART = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(d|h|m|s)")
_UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class LogLevel(StrEnum):
    """The levels of the log, the least important first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class LogSelection:
    """The lines that are shown. ``nodes``: the lines about these nodes; empty: all lines. ``since``: an aware time, or
    ``None``. ``level``: the least important level; ``None``: all."""

    nodes: frozenset[str] = frozenset()
    since: datetime | None = None
    level: LogLevel | None = None

    @property
    def takes_all(self) -> bool:
        """Whether no line is left out."""
        return not self.nodes and self.since is None and self.level is None

    def takes(self, line: str) -> bool:
        """Whether this line of the log is shown. A line of unknown form is shown only if no line is left out."""
        if self.takes_all:
            return True
        try:
            entry = json.loads(line)
            if self.nodes and entry.get("node") not in self.nodes:
                return False
            if self.level is not None and _rank(entry["level"]) < _rank(self.level):
                return False
            return self.since is None or datetime.fromisoformat(entry["at"]) >= self.since
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not a line that we have written
            return False


def _rank(level: str) -> int:
    """The importance of a level. Raises ValueError for an unknown one."""
    return list(LogLevel).index(LogLevel(level))


def parse_since(text: str, now: datetime) -> datetime:
    """The time of ``--since``: a duration before ``now`` (``90s``, ``1h30m``, ``2d``), a time of day, or a date with or
    without a time. Without a zone it is a time of ``now``'s zone. A time of day that is still to come was yesterday.

    Raises UsageError for any other text.
    """
    text = text.strip()
    parts = _DURATION_PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return now - timedelta(seconds=sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
    try:
        if re.fullmatch(r"\d\d:\d\d(:\d\d)?", text):
            time_today = datetime.fromisoformat(f"{now:%Y-%m-%d}T{text}").replace(tzinfo=now.tzinfo)
            return time_today if time_today <= now else time_today - timedelta(days=1)
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"--since {text[:60]!r} is neither a duration nor a time",
            hint="for example: --since 1h, --since 30m, --since 2d, --since 14:30, --since 2026-11-30T08:00",
        ) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=now.tzinfo)
