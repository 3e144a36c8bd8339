"""Reads the options of `bench run` (scenario, levels of concurrency, trace), and chooses the folder of the result."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.workload.arrivals import ArrivalProcess
    from gpumesh.bench.workload.lengths import Lengths
    from gpumesh.bench.workload.prompts import OwnPrompt
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


def parse_lengths(option: str, text: str) -> Lengths:
    """The lengths of prompts or answers, in tokens. Raises UsageError, with the name of the option, for a text of
    another form."""
    from gpumesh.bench.workload.lengths import parse_lengths as parse

    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from None


def parse_arrivals(text: str) -> tuple[ArrivalProcess, int]:
    """The arrivals of requests: ``constant``, ``poisson``, or ``burst:N`` with the number that come together. Raises
    UsageError for any other text."""
    from gpumesh.bench.workload.arrivals import ArrivalProcess

    name, colon, count = text.partition(":")
    try:
        process = ArrivalProcess(name)
        burst = int(count) if colon else 1
    except ValueError:
        process, burst = ArrivalProcess.BURST, 0
    if (process is ArrivalProcess.BURST) != bool(colon) or burst < 1:
        raise UsageError(f"--arrivals {text!r} is none of: constant, poisson, burst:N", hint="e.g. --arrivals burst:8")
    return process, burst


def read_own_prompts(file: Path | None) -> Sequence[OwnPrompt]:
    """The prompts of the user's file, which has the form that `run -f` reads; empty if no file is given. Raises
    UsageError for a line that is wrong, and if the file cannot be read."""
    if file is None:
        return ()
    from gpumesh.bench.workload.prompts import OwnPrompt
    from gpumesh.cli.prompt_input import read_prompts
    from gpumesh.daemon.sessions.prompt_requests import make_request
    from gpumesh.daemon.sessions.session import PromptRequest

    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error
    requests = [make_request(entry, PromptRequest(()), None) for entry in read_prompts(text, name=str(file))]
    return [OwnPrompt(request.messages, request.options) for request in requests]


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
