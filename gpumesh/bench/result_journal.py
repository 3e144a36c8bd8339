"""Writes a result to its folder while it is measured, so that a run that ends early leaves what it has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.report.report import report_html
from gpumesh.bench.result_folder import REPORT_FILE, REQUESTS_FILE, RESULT_FILE, RESULT_FILES, replace_file
from gpumesh.bench.results.result import BenchResult, records_json, result_text
from gpumesh.errors import GPUMeshError


class ResultJournal:
    """Keeps the result of a run in its folder: the settings at the start, then each stage as soon as it is measured.

    ``requests.jsonl`` grows, the other two files are replaced. ``result.json`` is written last, so each stage in it is
    also in the other files. If the folder already holds a result, that result stays until the first stage of the new
    run has figures.

    A write that fails, for example on a full disk, does not end the run: it is tried again with the next stage, and
    ``finish`` raises its error.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holds_older_result = any((folder / name).exists() for name in RESULT_FILES)
        self._records: Sequence[LoadSample] = ()
        self._written_record_count = 0  # how many of ``_records`` are in requests.jsonl
        self._written_stage_count = 0  # how many stages result.json has
        self._has_begun = False  # whether requests.jsonl belongs to this run
        self._is_written = True  # whether the files hold all of ``result``
        self._error: OSError | None = None  # of the latest write, if it has failed
        self.result: BenchResult | None = None

    def __repr__(self) -> str:
        return f"<ResultJournal {self._folder} {self._written_stage_count} stages>"

    @property
    def holds_figures(self) -> bool:
        """Whether a stage has figures."""
        return self.result is not None and bool(self.result.stages)

    def keep(self, result: BenchResult, records: Sequence[LoadSample]) -> None:
        """Writes the result, and the outcome of each request of the run until now. ``finish`` writes what could not be
        written here. Raises no OSError."""
        self.result, self._records, self._is_written = result, records, False
        if self._holds_older_result and not self.holds_figures:  # the older result stays until there are new figures
            return
        self._error = None
        try:
            self._write(result)
            self._is_written = True
        except OSError as error:
            self._error = error

    def end_early(self, reason: str) -> None:
        """Sets the reason in the result for which the run ended early. ``finish`` writes it."""
        assert self.result is not None, "end_early is called after keep"
        self.result = self.result.end_early(reason)
        self._is_written = False

    def finish(self) -> None:
        """Writes what is not written yet. Raises GPUMeshError when that fails, with what is missing."""
        assert self.result is not None, "finish is called after keep"
        if not self._is_written:
            self.keep(self.result, self._records)
        if self._error is not None:
            raise self._write_error(self._error)

    def discard(self) -> None:
        """Removes the files of a run that has measured nothing."""
        if self._has_begun:
            for name in RESULT_FILES:
                (self._folder / name).unlink(missing_ok=True)

    def _write(self, result: BenchResult) -> None:
        """Writes what is not written yet. Raises OSError."""
        requests_file = self._folder / REQUESTS_FILE
        if not self._has_begun:
            replace_file(requests_file, "")
            self._has_begun = True
        new_records = self._records[self._written_record_count :]
        _append(requests_file, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in records_json(new_records)))
        self._written_record_count += len(new_records)
        replace_file(self._folder / REPORT_FILE, report_html(result, self._records))
        replace_file(self._folder / RESULT_FILE, result_text(result))
        self._written_stage_count = len(result.stages)

    def _write_error(self, error: OSError) -> GPUMeshError:
        """The error of a result that could not be written as a whole. Its message says what the folder lacks."""
        assert self.result is not None, "something was written"
        missing = []
        missing_requests = len(self._records) - self._written_record_count
        if missing_requests:
            missing.append(f"{missing_requests} of {len(self._records)} requests")
        missing_stages = dict.fromkeys(stage.name for stage in self.result.stages[self._written_stage_count :])
        if missing_stages:
            missing.append(f"the figures of {', '.join(missing_stages)}")
        return GPUMeshError(
            f"cannot write to {self._folder}: {error.strerror or error}; not written: "
            + (" and ".join(missing) or "the last change of the result"),
            hint="what was printed is all there is of it; --out chooses another folder",
        )


def _append(path: Path, lines: str) -> None:
    """Adds lines to the file, all of them or none. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            data = memoryview(lines.encode())
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise
