"""Progress of several downloads at a time: a bar for each on a terminal, elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from gpumesh.cli.views.console import console
from gpumesh.cli.views.progress_bar import write_above_bars
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.mesh.models.model_store import PullProgress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class DownloadDisplay(Protocol):
    def __call__(self, name: str, step: PullProgress) -> None: ...

    def write(self, line: str) -> None:
        """A result, to stdout."""
        ...


@contextmanager
def show_downloads(*, quiet: bool) -> Iterator[DownloadDisplay]:
    """On stderr: stdout is for results."""
    out = console(stderr=True)
    if quiet:
        yield _Nothing()
        return
    if not out.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    said = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[what]}", markup=False)
    columns = (*said, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, redirect_stdout=False) as bars:
        yield _Bars(bars)


class _Nothing:
    def __call__(self, name: str, step: PullProgress) -> None: ...

    def write(self, line: str) -> None:
        typer.echo(line)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, step: PullProgress) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(clean_line(name, 40), total=None, what="")
        if step.total_bytes is None:
            self._bars.update(self._tasks[name], what=step.status)
        else:
            self._bars.update(
                self._tasks[name], what=step.status, completed=step.completed_bytes, total=step.total_bytes
            )

    def write(self, line: str) -> None:
        write_above_bars(self._bars, line)


class _Lines(_Nothing):
    """A line for each new step and for each tenth of a long one."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def __call__(self, name: str, step: PullProgress) -> None:
        said = format_step(step)
        if self._last.get(name) != said:
            self._last[name] = said
            typer.echo(clean_line(f"{name}: {said}"), err=True)


def format_step(step: PullProgress) -> str:
    if step.total_bytes is None:
        return step.status
    return f"{step.status} {10 * int(10 * min((step.completed_bytes or 0) / step.total_bytes, 1.0))} %"
