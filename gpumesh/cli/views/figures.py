"""Formats figures and names for people: GiB, milliseconds, durations, sparklines, short GPU names. Pure; no rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

UNKNOWN = "–"  # noqa: RUF001  # a dash, the usual sign for "no value" in tables


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters of the text, with ``…`` as the last one if something is cut off."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def short_gpu(name: str) -> str:
    """The part of a GPU's name that distinguishes cards: ``RTX 4090`` of ``NVIDIA GeForce RTX 4090``."""
    parts = [part for part in name.split(" ") if part.lower() not in ("nvidia", "geforce", "tesla", "quadro")]
    return " ".join(parts) or name


def format_gib(mib: int | None) -> str:
    """A size in MiB as GiB, without the unit: ``5.5``, with one decimal below 100; ``?`` for an unknown size."""
    if mib is None:
        return "?"
    gib = mib / 1024
    return f"{gib:.0f}" if gib >= 99.95 else f"{gib:.1f}"  # not 100: with a decimal, 99.95 would become "100.0"


def format_bytes(size: float | None) -> str:
    """A size in bytes with its unit: ``5.5 GiB``, and below one GiB ``312 MiB``; ``?`` for an unknown size."""
    if size is None:
        return "?"
    mib = size / 2**20
    return f"{format_gib(round(mib))} GiB" if mib >= 1023.5 else f"{mib:.0f} MiB"


_SPARK_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], highest: float) -> str:
    """One character for each value, on a scale from 0 to ``highest``; a blank where the value is unknown."""
    return "".join(" " if value is None else _spark(value / highest) for value in values)


def _spark(share: float) -> str:
    """The character for a share (0 to 1) of the highest value. Shares are rounded up: only the share 0 gets the lowest
    level."""
    highest_level = len(_SPARK_LEVELS) - 1
    level = math.ceil(share * highest_level)
    return _SPARK_LEVELS[min(max(level, 0), highest_level)]


def format_milliseconds(value: float | None) -> str:
    """A time in milliseconds with its unit: ``2.5 ms``, ``250 ms``, ``2.5 s``, ``25 s``."""
    if value is None:
        return UNKNOWN
    if value >= 10_000:
        return f"{value / 1000:.0f} s"
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def format_duration(seconds: float) -> str:
    """A duration in the largest unit that fits: ``45s``, ``4m``, ``3h``, ``2d``."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def format_time_left(until: datetime | None, now: datetime) -> str | None:
    """The time for which a model still stays in memory; ``None`` if ``until`` is not known. ``∞`` if ``until`` is more
    than a year away: Ollama writes such a date for ``keep_alive: -1``."""
    if until is None:
        return None
    seconds = (until - now).total_seconds()
    return "∞" if seconds > 86400 * 365 else format_duration(seconds)
