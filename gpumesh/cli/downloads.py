"""Progress of several downloads at a time: a bar for each on a terminal, elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import typer

from gpumesh.cli.render import console
from gpumesh.cli.store import Step
from gpumesh.cli.text import clean_line


class Shown(Protocol):
    def __call__(self, name: str, step: Step) -> None: ...


@contextmanager
def downloads(*, quiet: bool) -> Iterator[Shown]:
    """On stderr: stdout is for results."""
    out = console(stderr=True)
    if quiet:
        yield _nowhere
        return
    if not out.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    said = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[what]}", markup=False)
    columns = (*said, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bars:
        tasks = {}

        def show(name: str, step: Step) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(clean_line(name, 40), total=None, what="")
            if step.whole is None:
                bars.update(tasks[name], what=step.what)
            else:
                bars.update(tasks[name], what=step.what, completed=step.done, total=step.whole)

        yield show


def _nowhere(name: str, step: Step) -> None:
    del name, step


class _Lines:
    """A line for each new step and for each tenth of a long one."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def __call__(self, name: str, step: Step) -> None:
        said = in_tenths(step)
        if self._last.get(name) != said:
            self._last[name] = said
            typer.echo(clean_line(f"{name}: {said}"), err=True)


def in_tenths(step: Step) -> str:
    if step.whole is None:
        return step.what
    return f"{step.what} {10 * int(10 * min((step.done or 0) / step.whole, 1.0))} %"
