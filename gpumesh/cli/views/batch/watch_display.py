"""Shows on stderr how far a batch is while it is watched: a bar on a terminal, else a line for each tenth of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from gpumesh.batches.progress import BatchProgress
from gpumesh.cli.views.batch.texts import format_done, format_left, format_rate, format_status
from gpumesh.cli.views.console import console
from gpumesh.cli.views.progress_bar import show_text_bar
from gpumesh.cli.views.safe_text import clean_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LEAST_WIDTH_WITH_BAR = 80  # of a terminal, in characters; a narrower one has room for the figures alone


class WatchDisplay(Protocol):
    """A call shows how far the batch is now."""

    def __call__(self, progress: BatchProgress) -> None: ...


@contextmanager
def show_watch(*, quiet: bool) -> Iterator[WatchDisplay]:
    """Gives the caller a display that shows progress on stderr, because stdout is for the result. With ``quiet`` it
    shows nothing."""
    stderr = console(stderr=True)
    if quiet:
        yield lambda _: None
        return
    if not stderr.is_terminal:
        yield _ProgressLines()
        return
    with show_text_bar(stderr, bar_width=20, least_width=LEAST_WIDTH_WITH_BAR) as bar:
        yield _ProgressBar(bar)


class _ProgressBar:
    """A bar for the requests of the batch."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def __call__(self, progress: BatchProgress) -> None:
        batch, counts = progress.batch, progress.batch.counts
        if self._task is None:
            self._task = self._bar.add_task("", total=None, note="")
        self._bar.update(
            self._task,
            description=format_status(batch.status),
            total=counts.total or None,
            completed=counts.completed + counts.failed,
            note=_describe(progress),
        )


class _ProgressLines:
    """A line for each status, and for each tenth of the requests."""

    def __init__(self) -> None:
        self._last_step: object = None

    def __call__(self, progress: BatchProgress) -> None:
        batch, counts = progress.batch, progress.batch.counts
        step = batch.status, 10 * (counts.completed + counts.failed) // max(counts.total, 1)
        if step != self._last_step and not batch.status.has_ended:  # the command ends with the whole view
            self._last_step = step
            typer.echo(clean_line(f"{batch.id} {format_status(batch.status)}: {_describe(progress)}"), err=True)


def _describe(progress: BatchProgress) -> str:
    """``24,124 of 50,000, 12 failed, 34/s, 13m left``, or for which batch it waits."""
    left = format_left(progress)
    rate = format_rate(progress.rate_per_s) if progress.rate_per_s else ""
    wait = "" if progress.wait is None else f"waits behind {progress.wait.running_id}"
    return ", ".join(filter(None, [format_done(progress.batch), wait, rate, f"{left} left" if left else ""]))
