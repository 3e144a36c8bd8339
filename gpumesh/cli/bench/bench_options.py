"""Reads the options of `bench run` (scenario, levels of concurrency, trace), and chooses the folder of the result."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.workload.settings import Scenario
    from gpumesh.bench.workload.traces import TracedRequest

MAX_CONCURRENCY = 4096  # requests in flight


def parse_scenario(name: str) -> Scenario:
    """The scenario of this name. Raises UsageError for an unknown name."""
    from gpumesh.bench.workload.settings import Scenario

    try:
        return Scenario(name)
    except ValueError:
        raise UsageError(f"--scenario {name!r} is none of: {', '.join(Scenario)}") from None


def parse_levels(text: str | None) -> tuple[int, ...]:
    """The levels of concurrency: ``1,2,4`` as numbers of requests in flight; empty if the option is not given. Raises
    UsageError for any other text, and for a number out of range."""
    if text is None:
        return ()
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"-c {text!r} is not a list of numbers", hint="e.g. -c 1,2,4,8") from None
    if min(levels) < 1 or max(levels) > MAX_CONCURRENCY:
        raise UsageError(f"-c {text!r}: from 1 to {MAX_CONCURRENCY} requests in flight")
    return levels


def read_trace(file: Path | None, limit: int | None) -> Sequence[TracedRequest]:
    """The first ``limit`` requests of a trace (``None``: all), at most ``traces.MAX_REQUESTS``; empty if no file is
    given. Raises UsageError if the file cannot be read, or is no trace."""
    if file is None:
        return ()
    from gpumesh.bench.workload import traces

    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return traces.parse_trace(lines, file=str(file), limit=limit)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error


def results_folder() -> Path:
    """The folder of all results without ``--out``."""
    from gpumesh.config import environment

    return environment.state_dir() / "bench"


def new_result_folder(scenario: Scenario) -> Path:
    """The path of a folder that does not exist yet, named for the time and the scenario."""
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{scenario}"
    folder, number = results_folder() / name, 1
    while folder.exists():
        number += 1
        folder = results_folder() / f"{name}-{number}"
    return folder


def remove_if_empty(folder: Path) -> None:
    """Removes the folder of a run that ended before it had a result. A folder with files in it stays."""
    try:
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError:
        pass  # another process has put a file there, or has removed the folder
