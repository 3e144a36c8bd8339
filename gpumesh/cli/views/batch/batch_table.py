"""The table of `gpumesh batch list`."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.batches.progress import BatchProgress
from gpumesh.cli.views.batch.texts import (
    format_left,
    format_name,
    format_rate,
    format_share,
    format_status,
    status_mark,
)
from gpumesh.cli.views.figures import UNKNOWN, format_duration
from gpumesh.cli.views.tables import Cell, Column, print_fitted_table

_COLUMNS = (
    Column("BATCH"),
    Column("STATUS"),
    Column("DONE", 1, right=True),
    Column("FAILED", 2, right=True),
    Column("REQUESTS", 3, right=True),
    Column("NAME", 1, min_width=12),
    Column("LEFT", 4, right=True),
    Column("RATE", 5, right=True),
    Column("AGE", 4, right=True),
    Column("WRONG LINES", 6, right=True),
    Column("KEY", 6, min_width=8),
    Column("SENT TO", 7),
)


def print_batches(batches: Sequence[BatchProgress], now: float, *, wide: bool = False) -> None:
    """Prints a row for each batch to stdout; with ``wide`` all columns. ``now``: seconds since 1970."""
    print_fitted_table(_COLUMNS, [_make_row(progress, now) for progress in batches], wide=wide)


def _make_row(progress: BatchProgress, now: float) -> list[Cell | str]:
    batch, counts = progress.batch, progress.batch.counts
    mark, style = status_mark(batch)
    return [
        batch.id,
        Cell(f"{mark} {format_status(batch.status)}", style),
        format_share(batch),
        Cell(f"{counts.failed:,}", "red") if counts.failed else "",
        f"{counts.total:,}",
        format_name(batch),
        format_left(progress),
        "" if progress.rate_per_s is None else format_rate(progress.rate_per_s) if progress.rate_per_s else UNKNOWN,
        format_duration(now - batch.created_at),
        f"{batch.error_count:,}" if batch.error_count else "",
        batch.new.owner,
        batch.new.endpoint,
    ]
