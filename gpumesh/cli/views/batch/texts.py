"""Texts and bars that all views of batches share. Pure."""

from __future__ import annotations

from rich.text import Text

from gpumesh.batches.progress import BatchProgress
from gpumesh.batches.values import Batch, BatchStatus
from gpumesh.cli.views.figures import format_bytes, format_duration, shorten
from gpumesh.cli.views.safe_text import clean_line

MAX_NAME_LENGTH = 60
# The mark before a status and its style for rich.
_STATUS_MARKS = {
    BatchStatus.VALIDATING: ("◐", "cyan"),
    BatchStatus.FAILED: ("✗", "red"),
    BatchStatus.IN_PROGRESS: ("◐", "cyan"),
    BatchStatus.FINALIZING: ("◐", "cyan"),
    BatchStatus.COMPLETED: ("●", "green"),
    BatchStatus.EXPIRED: ("✗", "yellow"),
    BatchStatus.CANCELLING: ("‖", "cyan"),
    BatchStatus.CANCELLED: ("○", "dim"),
}


def status_mark(batch: Batch) -> tuple[str, str]:
    """The mark and the style of a batch's status: a batch that is completed stands out if some of it has failed."""
    if batch.status is BatchStatus.COMPLETED and batch.counts.failed:
        return "●", "yellow"
    return _STATUS_MARKS[batch.status]


def format_status(status: BatchStatus) -> str:
    return status.value.replace("_", " ")


def format_name(batch: Batch) -> str:
    """Its name, which a client may have chosen; empty if it has none."""
    return shorten(clean_line(batch.new.name), MAX_NAME_LENGTH)


def format_share(batch: Batch) -> str:
    """How much of it has a result: ``48 %``. Neither 0 nor 100, unless that is exactly so."""
    counts = batch.counts
    done = counts.completed + counts.failed
    if not counts.total or batch.status is BatchStatus.VALIDATING:  # while its file is read, the total still grows
        return ""
    percent = 100 * done // counts.total
    return f"{'<1' if done and not percent else percent} %"


def format_done(batch: Batch) -> str:
    """``24,112 of 50,000``, and how many of them have failed."""
    counts = batch.counts
    failed = f", {counts.failed:,} failed" if counts.failed else ""
    return f"{counts.completed + counts.failed:,} of {counts.total:,}{failed}"


def format_rate(per_s: float) -> str:
    """A rate in the unit in which it is at least 1: ``34/s``, ``2.5/s``, ``12/min``, ``5/h``."""
    for factor, unit in ((1, "s"), (60, "min")):
        if per_s * factor >= 1:
            return f"{_format_figure(per_s * factor)}/{unit}"
    return f"{_format_figure(per_s * 3600)}/h"


def _format_figure(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def format_size(batch: Batch) -> str:
    """The size of its results."""
    size = batch.counts.output_bytes + batch.counts.error_bytes
    return format_bytes(size) if size >= 1 << 20 else f"{-(-size // 1024)} KiB"


def format_left(progress: BatchProgress) -> str:
    """The time that is left, or nothing if it is not known."""
    return "" if progress.left_s is None else format_duration(progress.left_s)


def progress_bar(batch: Batch, length: int) -> Text:
    """What is answered, what has failed and what waits, as ``length`` characters."""
    from gpumesh.cli.views.pool.bars import divide

    counts = batch.counts
    parts = divide(length, (counts.completed, counts.failed, counts.unfinished))
    text = Text("█" * parts[0], style="green")
    return text.append("█" * parts[1], style="red").append("░" * parts[2], style="dim")
