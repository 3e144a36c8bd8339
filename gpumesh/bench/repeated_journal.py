"""Writes the results of a scenario that is run several times: each run in a folder of its own, and their joint result.

``DIR/run-1`` … ``DIR/run-N`` hold the results of the runs, as ``ResultJournal`` writes them. ``DIR/result.json`` and
``DIR/report.html`` are the joint result of the runs that have come to their end; they are written after each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report.report import report_html
from gpumesh.bench.result_folder import (
    REPORT_FILE,
    REQUESTS_FILE,
    RESULT_FILE,
    RESULT_FILES,
    find_run_folders,
    replace_file,
    run_folder,
)
from gpumesh.bench.result_journal import ResultJournal
from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.result import BenchResult, result_text
from gpumesh.errors import GPUMeshError


class RepeatedJournal:
    """Keeps the results of several runs in a folder. It is used as a ``ResultJournal``.

    A result that is not partial ends a run; the next result is that of the next run. A run that was ended early is in
    its own folder, and in the joint result only if no run has come to its end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._older_runs = find_run_folders(folder)
        self._ended_runs: list[BenchResult] = []
        self._current: ResultJournal | None = None  # the journal of the run that is measured now
        self._end_reason: str | None = None  # why the runs ended early
        self._error: GPUMeshError | None = None  # the error of the first run that could not be written as a whole

    def __repr__(self) -> str:
        return f"<RepeatedJournal {self._folder} {len(self._ended_runs)} runs>"

    @property
    def result(self) -> BenchResult | None:
        """The joint result of the runs that have ended; until the first run has ended, the result of that run."""
        if not self._ended_runs:
            return None if self._current is None else self._current.result
        joint = join_runs(self._ended_runs)
        return joint if self._end_reason is None else joint.end_early(self._end_reason)

    @property
    def holds_figures(self) -> bool:
        """Whether a stage of any run has figures."""
        return bool(self._ended_runs) or (self._current is not None and self._current.holds_figures)

    def keep(self, result: BenchResult, records: Sequence[LoadSample]) -> None:
        """Writes the result of the current run, and the outcome of each of its requests until now.

        Raises no error of a write: ``finish`` raises it.
        """
        if self._current is None:
            folder = run_folder(self._folder, len(self._ended_runs) + 1)
            with contextlib.suppress(OSError):  # the journal cannot write there, and keeps that error
                folder.mkdir(parents=True, exist_ok=True)
            self._current = ResultJournal(folder)
        self._current.keep(result, records)
        if not result.partial:
            self._ended_runs.append(result)
            try:
                self._current.finish()
                self._write_joint()
            except GPUMeshError as error:  # the next runs are measured all the same
                self._error = self._error or error
            self._current = None

    def end_early(self, reason: str) -> None:
        """Sets the reason in the result for which the runs ended early."""
        self._end_reason = reason
        if self._current is not None and self._current.result is not None:
            self._current.end_early(reason)

    def finish(self) -> None:
        """Writes what is not written yet. Raises GPUMeshError when that fails."""
        if self._current is not None and self._current.holds_figures:
            self._current.finish()
        self._write_joint()
        if self._error is not None:
            raise self._error

    def discard(self) -> None:
        """Removes the files of a first run that has measured nothing."""
        if self._current is not None:
            self._current.discard()
        _remove_if_empty(run_folder(self._folder, 1))

    def _write_joint(self) -> None:
        """Writes the joint result, and removes the runs of an older result. Raises GPUMeshError."""
        if not self._ended_runs or self.result is None:
            return
        try:
            replace_file(self._folder / REPORT_FILE, report_html(self.result))
            replace_file(self._folder / RESULT_FILE, result_text(self.result))
            (self._folder / REQUESTS_FILE).unlink(missing_ok=True)  # of an older result of a single run
            self._remove_older_runs()
        except OSError as error:
            raise GPUMeshError(
                f"cannot write to {self._folder}: {error.strerror or error}; its folders run-… hold the runs",
                hint="--out chooses another folder",
            ) from None

    def _remove_older_runs(self) -> None:
        """Removes the runs of an older result that have higher numbers than the runs of this journal."""
        own_folders = {run_folder(self._folder, number + 1) for number in range(len(self._ended_runs))}
        for folder in self._older_runs:
            if folder not in own_folders:
                for name in RESULT_FILES:
                    (folder / name).unlink(missing_ok=True)
                _remove_if_empty(folder)
        self._older_runs = []


def _remove_if_empty(folder: Path) -> None:
    """Removes the folder, unless it holds anything."""
    with contextlib.suppress(OSError):  # it holds other files, or does not exist
        folder.rmdir()
