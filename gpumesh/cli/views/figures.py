"""Figures and names as people write them: GiB, milliseconds, durations, sparklines, short GPU names. Pure; no rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

UNKNOWN = "–"  # noqa: RUF001  # a dash, as tables have it


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def short_gpu(name: str) -> str:
    """``NVIDIA GeForce RTX 4090`` -> ``RTX 4090``: the part that distinguishes cards."""
    parts = [part for part in name.split(" ") if part.lower() not in ("nvidia", "geforce", "tesla", "quadro")]
    return " ".join(parts) or name


def format_gib(mib: int | None) -> str:
    """``5.5``: GiB with one decimal below 100."""
    if mib is None:
        return "?"
    value = mib / 1024
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"  # 99.95 would become "100.0"


_SPARK_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], highest: float) -> str:
    """One character for each value, on a scale from 0 to ``highest``; a blank where the value is unknown."""
    top = len(_SPARK_LEVELS) - 1
    return "".join(
        " " if value is None else _SPARK_LEVELS[min(max(math.ceil(value / highest * top), 0), top)] for value in values
    )


def format_milliseconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value >= 10_000:
        return f"{value / 1000:.0f} s"
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def format_duration(seconds: float) -> str:
    """``45s``, ``4m``, ``3h``, ``2d``: the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def format_time_left(until: datetime | None, now: datetime) -> str | None:
    """The time for which a model still stays in memory. It is ``∞`` when ``until`` is more than a year away: Ollama
    writes such a date for ``keep_alive: -1``."""
    if until is None:
        return None
    seconds = (until - now).total_seconds()
    return "∞" if seconds > 86400 * 365 else format_duration(seconds)
