"""``UsageReport``: what was used since a day, by key, model, node or day; read from the store's file, also without a
mesh. Its JSON is ``gpumesh.usage/1``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from gpumesh.config.value_parsers import format_rate
from gpumesh.gateway.usage.counts import UsageCounts
from gpumesh.gateway.usage.store import KEPT_DAYS, read_rows
from gpumesh.topology import KeySpec

SCHEMA = "gpumesh.usage/1"
DEFAULT_SINCE = "30d"


class Grouping(StrEnum):
    """What the counts are summed by."""

    KEY = "key"
    MODEL = "model"
    NODE = "node"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class UsageLine:
    """The counts of one group. ``values`` has a value for each grouping of the report."""

    values: tuple[str, ...]
    counts: UsageCounts


@dataclass(frozen=True, slots=True)
class KeyBudget:
    """The limits of a key of mesh.yaml, and the tokens that it has used in this month. ``None``: no such limit."""

    key: str
    used_tokens: int
    tokens_per_month: int | None
    rate: str | None


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The counts since the day ``since`` (in UTC, this day included), as of ``at``."""

    at: datetime
    since: str
    by: tuple[Grouping, ...]
    lines: tuple[UsageLine, ...]
    total: UsageCounts
    budgets: tuple[KeyBudget, ...] = ()


def parse_since(text: str, now: datetime) -> str:
    """The first day of ``30d`` (30 days, today included) or of a date such as ``2026-11-01``. Raises ValueError, whose
    text completes a sentence that begins with the value."""
    match = re.fullmatch(r"([0-9]{1,4})d", text.strip())
    if match is not None:
        days = int(match[1])
        if not 1 <= days <= KEPT_DAYS:
            raise ValueError(f"is not between 1d and {KEPT_DAYS}d")
        return f"{now - timedelta(days=days - 1):%Y-%m-%d}"
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text.strip()):
        try:
            return date.fromisoformat(text.strip()).isoformat()
        except ValueError:
            raise ValueError("is no day of the calendar") from None
    raise ValueError("is neither a number of days (30d) nor a date (2026-11-01)")


def read_report(
    path: Path,
    *,
    by: Sequence[Grouping],
    since: str,
    keys: Iterable[KeySpec] = (),
    only_key: str | None = None,
    now: datetime | None = None,
) -> UsageReport:
    """Reads the report from the file at ``path``. ``since``: the result of ``parse_since``. ``keys``: those of
    mesh.yaml. ``only_key``: what others have used is left out. Waits for the disk. Raises sqlite3.Error,
    or OSError."""
    now = now or datetime.now(UTC)
    groupings = tuple(dict.fromkeys(by))
    sums = read_rows(path, groupings, since=since, key=only_key)
    lines = [UsageLine(values, counts) for values, counts in sums.items()]
    total = UsageCounts()
    for line in lines:
        total.add(line.counts)
    budgets = _read_budgets(path, [key for key in keys if only_key is None or key.name == only_key], now)
    return UsageReport(now, since, groupings, tuple(_sort_lines(lines, groupings)), total, tuple(budgets))


def _sort_lines(lines: Iterable[UsageLine], by: Sequence[Grouping]) -> list[UsageLine]:
    """By day: the oldest first. Otherwise those with the most tokens first."""

    def sort_key(line: UsageLine) -> tuple[str, int, tuple[str, ...]]:
        day = line.values[by.index(Grouping.DAY)] if Grouping.DAY in by else ""
        return day, -(line.counts.prompt_tokens + line.counts.answer_tokens), line.values

    return sorted(lines, key=sort_key)


def _read_budgets(path: Path, keys: Sequence[KeySpec], now: datetime) -> list[KeyBudget]:
    """What the keys with a limit have used of it in this month."""
    limited = [key for key in keys if key.rate is not None or key.tokens_per_month is not None]
    if not limited:
        return []
    counts = read_rows(path, (Grouping.KEY,), since=f"{now:%Y-%m}-01")
    budgets = []
    for key in limited:
        used = counts.get((key.name,), UsageCounts())
        rate = None if key.rate is None else format_rate(key.rate)
        budgets.append(KeyBudget(key.name, used.prompt_tokens + used.answer_tokens, key.tokens_per_month, rate))
    return budgets


def next_month(now: datetime) -> datetime:
    """The beginning of the month after ``now``, in UTC."""
    year, month = (now.year, now.month + 1) if now.month < 12 else (now.year + 1, 1)
    return datetime(year, month, 1, tzinfo=UTC)


def report_json(report: UsageReport, mesh: str) -> Mapping[str, object]:
    """The document of ``GET /mesh/usage`` and of `gpumesh usage --json`. ``mesh``: its name."""
    month_ends_at = next_month(report.at)
    return {
        "schema": SCHEMA,
        "mesh": mesh,
        "at": f"{report.at:%Y-%m-%dT%H:%M:%SZ}",
        "since": report.since,
        "by": list(report.by),
        "rows": [
            {**dict(zip(report.by, line.values, strict=True)), **_counts_json(line.counts)} for line in report.lines
        ],
        "total": _counts_json(report.total),
        "budgets": [
            {
                "key": budget.key,
                "tokens_per_month": budget.tokens_per_month,
                "used_tokens": budget.used_tokens,
                "month": f"{report.at:%Y-%m}",
                "resets_at": f"{month_ends_at:%Y-%m-%dT%H:%M:%SZ}",
                "rate": budget.rate,
            }
            for budget in report.budgets
        ],
    }


def _counts_json(counts: UsageCounts) -> dict[str, object]:
    """The counts as members of the JSON document."""
    return {
        "requests": counts.requests,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.answer_tokens,
        "tokens": counts.prompt_tokens + counts.answer_tokens,
        "estimated_requests": counts.estimated,
        "gpu_seconds": round(counts.gpu_s, 3),
        "energy_wh": round(counts.energy_j / 3600.0, 3) if counts.energy_j else None,
    }
