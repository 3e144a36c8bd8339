"""Shows the progress of several downloads at once: a bar for each on a terminal, else a line for each 10 % of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from gpumesh.cli.views.console import console
from gpumesh.cli.views.progress_bar import write_above_bars
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.text.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gpumesh.mesh.models.store_answers import StoreStep

MAX_STATUS_CHARS = 60


class DownloadDisplay(Protocol):
    """A display of downloads. A call shows a new step of the download ``name``; ``write`` writes a result to stdout."""

    def __call__(self, name: str, step: StoreStep) -> None: ...

    def write(self, line: str) -> None: ...


@contextmanager
def show_downloads(*, quiet: bool) -> Iterator[DownloadDisplay]:
    """Gives the caller a display that shows progress on stderr, because stdout is for results. With ``quiet`` it shows
    no progress, and only writes results."""
    stderr = console(stderr=True)
    if quiet:
        yield _NoProgress()
        return
    if not stderr.is_terminal:
        yield _ProgressLines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name_column = TextColumn("{task.description}", markup=False)
    status_column = TextColumn("{task.fields[status]}", markup=False)
    columns = (
        name_column,
        status_column,
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # By default rich redirects stdout to its own console: results would go to the terminal and not into a file.
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=False) as bars:
        yield _ProgressBars(bars)


class _NoProgress:
    """A display that only writes results."""

    def __call__(self, name: str, step: StoreStep) -> None: ...

    def write(self, line: str) -> None:
        typer.echo(line)


class _ProgressBars:
    """A bar for each download."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}  # the bar of each download, by its name

    def __call__(self, name: str, step: StoreStep) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(clean_line(name, 40), total=None, status="")
        status = printable(step.status, MAX_STATUS_CHARS)
        if step.total_bytes is None:
            self._bars.update(self._tasks[name], status=status)
        else:
            self._bars.update(self._tasks[name], status=status, completed=step.completed_bytes, total=step.total_bytes)

    def write(self, line: str) -> None:
        write_above_bars(self._bars, line)


class _ProgressLines(_NoProgress):
    """A line for each new step, and for each tenth of a step whose size is known. A text that did not change since the
    last line of its download is not printed again."""

    def __init__(self) -> None:
        self._last_texts: dict[str, str] = {}  # by the name of the download

    def __call__(self, name: str, step: StoreStep) -> None:
        text = format_step(step)
        if self._last_texts.get(name) != text:
            self._last_texts[name] = text
            typer.echo(clean_line(f"{name}: {text}"), err=True)


def format_step(step: StoreStep) -> str:
    """The status of a step and, if its size is known, how much of it is done: ``pulling 30 %``, rounded down to
    tens."""
    status = printable(step.status, MAX_STATUS_CHARS)
    if step.total_bytes is None:
        return status
    share = min((step.completed_bytes or 0) / step.total_bytes, 1.0)
    completed_tenths = int(10 * share)
    return f"{status} {10 * completed_tenths} %"
