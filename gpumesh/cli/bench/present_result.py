"""Prints the result of `bench run`, then writes its files; also of a run that ended early."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TypeAlias

import typer

from gpumesh.bench.repeated_journal import RepeatedJournal
from gpumesh.bench.result_journal import ResultJournal
from gpumesh.bench.results.result import BenchResult, result_json
from gpumesh.cli.bench import bench_options
from gpumesh.cli.error_exit import print_error
from gpumesh.cli.json_output import print_json
from gpumesh.cli.views import bench_tables
from gpumesh.errors import ExitCode, GPUMeshError

AnyJournal: TypeAlias = ResultJournal | RepeatedJournal

_SIGNAL_EXIT = 128  # a process that a signal ends exits with this plus the signal's number


def present_result(journal: AnyJournal, folder: Path, *, as_json: bool, quiet: bool) -> None:
    """Prints a whole result, and writes its files after that: so a full disk cannot keep the person from seeing it.

    Raises GPUMeshError when the files cannot be written, and Exit with code 1 when a request has failed.
    """
    result = journal.result
    assert result is not None, "the run has ended without an error"
    try:
        _print_result(result, as_json=as_json, quiet=quiet)
    finally:
        journal.finish()
    if not quiet:
        typer.echo(f"result in {folder} (report.html opens in a browser)", err=True)
    if result.failed:
        if not quiet:
            failed_text = "1 request" if result.failed == 1 else f"{result.failed} requests"
            typer.echo(f"{failed_text} failed; the report says why", err=True)
        raise typer.Exit(int(ExitCode.FAILED))


def present_partial_result(
    journal: AnyJournal, folder: Path, end: BaseException, *, as_json: bool, quiet: bool
) -> None:
    """Prints and writes what was measured before ``end`` ended the run. Without a figure, nothing is left behind.

    Raises no error: the caller raises ``end``.
    """
    if not journal.holds_figures:
        with contextlib.suppress(OSError):
            journal.discard()
        bench_options.remove_if_empty(folder)
        return
    journal.end_early(describe_end(end))
    assert journal.result is not None, "it holds figures"
    with contextlib.suppress(OSError):  # the terminal may have gone, after SIGHUP
        _print_result(journal.result, as_json=as_json, quiet=quiet)
    try:
        journal.finish()
    except GPUMeshError as error:
        print_error(error)
    else:
        if not quiet:
            typer.echo(f"partial result in {folder} (report.html opens in a browser)", err=True)


def describe_end(end: BaseException) -> str:
    """What ended a run: the error's sentence, or the signal."""
    if isinstance(end, GPUMeshError):
        return end.message
    if isinstance(end, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    code = end.exit_code if isinstance(end, typer.Exit) else end.code if isinstance(end, SystemExit) else None
    if code == ExitCode.INTERRUPTED:
        return "interrupted by Ctrl-C"
    if isinstance(code, int):
        with contextlib.suppress(ValueError):  # no signal has this number
            return f"ended by {signal.Signals(code - _SIGNAL_EXIT).name}"
    return f"ended by an error ({type(end).__name__})"


def _print_result(result: BenchResult, *, as_json: bool, quiet: bool) -> None:
    """Prints the result to stdout, and its notes to stderr."""
    if as_json:
        print_json(result_json(result))
    else:
        bench_tables.print_result(result, notes=not quiet)
