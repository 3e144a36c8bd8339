"""Shows on stderr how far the start of a pool is: a bar on a terminal, else a line for each phase and each tenth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import typer

from gpumesh.cli.views.console import console
from gpumesh.cli.views.pool.state_view import describe_reason, format_progress, format_share
from gpumesh.cli.views.progress_bar import show_text_bar
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.pools.base import PoolPhase, PoolState

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LEAST_WIDTH_WITH_BAR = 76  # of a terminal, in characters; a narrower one has room for the figures alone
PHASE_TEXTS = {
    PoolPhase.STOPPED: "has stopped",
    PoolPhase.PLANNING: "looks at its hosts and its model",
    PoolPhase.STARTING: "starts its programs",
    PoolPhase.LOADING: "loads the model",
    PoolPhase.READY: "is ready",
    PoolPhase.BACKOFF: "waits for its next start",
    PoolPhase.FAILED: "has failed",
    PoolPhase.STOPPING: "stops its programs",
}


class StartDisplay(Protocol):
    """A call shows a new state of the pool."""

    def __call__(self, state: PoolState) -> None: ...


@contextmanager
def show_start(*, quiet: bool) -> Iterator[StartDisplay]:
    """Gives the caller a display that shows progress on stderr, because stdout is for the result. With ``quiet`` it
    shows nothing."""
    stderr = console(stderr=True)
    if quiet:
        yield lambda _: None
        return
    if not stderr.is_terminal:
        yield _ProgressLines()
        return
    with show_text_bar(stderr, bar_width=14, least_width=LEAST_WIDTH_WITH_BAR) as bar:
        yield _ProgressBar(bar)


class _ProgressBar:
    """A bar for the model's bytes, and a line above it for each failure."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._last_failure: object = None

    def __call__(self, state: PoolState) -> None:
        description = clean_line(f"{state.pool} {PHASE_TEXTS[state.phase]}", 80)
        is_loading = state.phase is PoolPhase.LOADING
        if self._task is None:
            self._task = self._bar.add_task(description, total=None, note="")
        self._bar.update(
            self._task,
            description=description,
            total=state.load_bytes if is_loading else None,
            completed=(state.loaded_bytes or 0) if is_loading else 0,
            note=clean_line(_describe_bytes(state) or _describe_wait(state), 60),
        )
        failure = _identify_failure(state)
        if failure is not None and failure != self._last_failure:
            self._bar.console.print(_describe_failure(state), markup=False, highlight=False)
        self._last_failure = failure


class _ProgressLines:
    """A line for each phase, for each tenth of the loading, and for each failure."""

    def __init__(self) -> None:
        self._last_step: object = None

    def __call__(self, state: PoolState) -> None:
        tenth = None
        if state.phase is PoolPhase.LOADING and state.load_bytes and state.loaded_bytes is not None:
            tenth = min(10 * state.loaded_bytes // state.load_bytes, 10)
        step = (state.phase, tenth, state.reason, _identify_failure(state))
        if step == self._last_step or state.phase is PoolPhase.FAILED:  # the command ends with its error
            return
        self._last_step = step
        progress = format_progress(state) or _describe_wait(state)
        text = f"{state.pool} {PHASE_TEXTS[state.phase]}{': ' if progress else ''}{progress}"
        typer.echo(clean_line(text) if _identify_failure(state) is None else _describe_failure(state), err=True)


def _describe_bytes(state: PoolState) -> str:
    """How many bytes have been loaded, how fast, and the time that is left: the share is seen in the bar."""
    share = format_share(state)
    return format_progress(state).removeprefix(f"{share}, ") if share else format_progress(state)


def _describe_wait(state: PoolState) -> str:
    """What a start waits for. While the pool stops, its reason is that of the error which follows."""
    is_starting = state.phase in (PoolPhase.PLANNING, PoolPhase.STARTING, PoolPhase.LOADING)
    return (state.reason or "") if is_starting else ""


def _identify_failure(state: PoolState) -> object:
    """Tells one failure from the next, while the time until the next start changes; ``None`` if the pool waits for no
    start. (After a failure that a person must mend, the command ends with its error.)"""
    return (state.starts, state.reason) if state.phase is PoolPhase.BACKOFF else None


def _describe_failure(state: PoolState) -> str:
    return clean_line(f"{state.pool} has failed: {describe_reason(state)}")


def show_waiting(text: str, *, quiet: bool) -> AbstractContextManager[object]:
    """Shows on stderr, while the block runs, what is waited for; only on a terminal."""
    stderr = console(stderr=True)
    return nullcontext() if quiet or not stderr.is_terminal else stderr.status(clean_line(text, 100), spinner="line")
