"""Shows a progress bar on stderr, and writes results to stdout while a bar is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.text import Text

from gpumesh.cli.views.console import console
from gpumesh.cli.views.safe_text import clean_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class ProgressDisplay(Protocol):
    """A display of progress. A call passes ``done``, the number of prompts or requests that have ended, and ``note``, a
    text behind the bar. ``begin`` empties the bar and gives it another total. ``write`` writes a result to stdout."""

    def __call__(self, done: int, note: str = "") -> None: ...

    def begin(self, total: int) -> None: ...

    def write(self, line: str) -> None: ...


class _HiddenBar:
    """A display that only writes results."""

    def __call__(self, done: int, note: str = "") -> None: ...

    def begin(self, total: int) -> None: ...

    def write(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


class _ShownBar(_HiddenBar):
    """A display with one bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def __call__(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, note=clean_line(note, 60))

    def begin(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def write(self, line: str) -> None:
        write_above_bars(self._bar, line)


def write_above_bars(bars: Progress, line: str) -> None:
    """Writes a result to stdout while bars are shown on stderr. If stdout is a terminal, rich must write it, above the
    bars: otherwise it would end up in the midst of them."""
    if sys.stdout.isatty():
        bars.console.print(Text(line), soft_wrap=True)
    else:
        _HiddenBar().write(line)


@contextmanager
def show_progress(total: int, title: str, *, quiet: bool) -> Iterator[ProgressDisplay]:
    """Gives the caller a display with a bar on stderr, which is full at ``total``. With ``quiet``, or where stderr is
    no terminal, the display shows no bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    if quiet or not out.is_terminal:
        yield _HiddenBar()
        return
    title_column = TextColumn("{task.description}", markup=False)
    note_column = TextColumn("{task.fields[note]}", markup=False)
    columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
    # By default rich redirects stdout to its own console: results would go to the terminal and not into a file.
    with Progress(*columns, console=out, transient=True, redirect_stdout=False) as bar:
        yield _ShownBar(bar, bar.add_task(title, total=total, note=""))


@contextmanager
def show_text_bar(stderr: Console, *, bar_width: int, least_width: int) -> Iterator[Progress]:
    """Shows one task on the terminal ``stderr``: its description, a bar of ``bar_width`` characters, and its field
    ``note``. A terminal of less than ``least_width`` characters has room for the texts alone."""
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
    from rich.table import Column

    def text_column(text: str) -> TextColumn:
        return TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))

    columns: list[ProgressColumn] = [SpinnerColumn("line"), text_column("{task.description}")]
    if stderr.width >= least_width:
        columns.append(BarColumn(bar_width=bar_width))
    columns.append(text_column("{task.fields[note]}"))
    # By default rich redirects stdout to its own console: results would go to the terminal and not into a file.
    with Progress(*columns, console=stderr, transient=True, redirect_stdout=False) as bar:
        yield bar
