"""Progress of several downloads at a time: a bar for each on a terminal, else a line for each tenth of a download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from gpumesh.cli.views.console import console
from gpumesh.cli.views.progress_bar import write_above_bars
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gpumesh.mesh.models.store_answers import StoreStep

MAX_STATUS_CHARS = 60


class DownloadDisplay(Protocol):
    """Shows a new step of the download ``name``."""

    def __call__(self, name: str, step: StoreStep) -> None: ...

    def write(self, line: str) -> None:
        """Writes a result to stdout."""
        ...


@contextmanager
def show_downloads(*, quiet: bool) -> Iterator[DownloadDisplay]:
    """Shows progress on stderr, because stdout is for results. With ``quiet`` only results are written."""
    stderr = console(stderr=True)
    if quiet:
        yield _NoProgress()
        return
    if not stderr.is_terminal:
        yield _ProgressLines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    texts = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[what]}", markup=False)
    columns = (*texts, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=False) as bars:
        yield _ProgressBars(bars)


class _NoProgress:
    def __call__(self, name: str, step: StoreStep) -> None: ...

    def write(self, line: str) -> None:
        typer.echo(line)


class _ProgressBars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, step: StoreStep) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(clean_line(name, 40), total=None, what="")
        status = printable(step.status, MAX_STATUS_CHARS)
        if step.total_bytes is None:
            self._bars.update(self._tasks[name], what=status)
        else:
            self._bars.update(self._tasks[name], what=status, completed=step.completed_bytes, total=step.total_bytes)

    def write(self, line: str) -> None:
        write_above_bars(self._bars, line)


class _ProgressLines(_NoProgress):
    """A line for each new step, and for each tenth of a step whose size is known."""

    def __init__(self) -> None:
        self._last_texts: dict[str, str] = {}

    def __call__(self, name: str, step: StoreStep) -> None:
        text = format_step(step)
        if self._last_texts.get(name) != text:
            self._last_texts[name] = text
            typer.echo(clean_line(f"{name}: {text}"), err=True)


def format_step(step: StoreStep) -> str:
    """The status, and how much of it is done, in percent rounded down to tens."""
    status = printable(step.status, MAX_STATUS_CHARS)
    if step.total_bytes is None:
        return status
    share = min((step.completed_bytes or 0) / step.total_bytes, 1.0)
    return f"{status} {10 * int(10 * share)} %"
