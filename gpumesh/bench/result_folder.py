"""The folder of a benchmark's result: ``result.json``, ``requests.jsonl`` and ``report.html``.

``requests.jsonl`` has a line for each request. ``result_journal`` writes the files. If the scenario was run several
times, the folders ``run-1``, ``run-2`` … have these files, and ``repeated_journal`` writes their joint result.

A folder that holds a result is overwritten only with ``force``. Text in a result came from hosts: the code that shows a
result makes its text printable.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.result import BenchResult, result_from_json
from gpumesh.errors import UsageError
from gpumesh.files import atomic_file

RESULT_FILE, REQUESTS_FILE, REPORT_FILE = "result.json", "requests.jsonl", "report.html"
RESULT_FILES = (RESULT_FILE, REQUESTS_FILE, REPORT_FILE)
# The result of a long sweep has about 100 KB. A much larger file is none of ours.
MAX_RESULT_BYTES = 64 << 20


def check_result_folder(folder: Path, *, force: bool = False) -> None:
    """Raises UsageError when a result could not be written to ``folder``. Makes the folder if it does not exist.

    A measurement takes minutes: so this is called before it starts. ``force``: a folder that holds a result already is
    no error.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="choose another with --out")
    existing = [name for name in RESULT_FILES if (folder / name).exists()]
    existing += [run.name for run in find_run_folders(folder)]
    if existing and not force:
        raise UsageError(
            f"{folder} holds a result already ({', '.join(existing)})", hint="choose another with --out, or add --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the only sure test that files can be made in the folder
            pass
    except OSError as error:
        raise _write_error(folder, error) from None


def replace_file(path: Path, text: str) -> None:
    """Replaces the file as a whole, without a sync to the disk: a result that a power failure loses is no disaster."""
    atomic_file.replace(path, text, mode=0o644, sync=False)


def _write_error(folder: Path, error: OSError) -> UsageError:
    """Makes the error for a folder to which a result cannot be written."""
    return UsageError(f"cannot write to {folder}: {error.strerror or error}", hint="choose another with --out")


def run_folder(folder: Path, number: int) -> Path:
    """The folder of one of several runs; the first run has the number 1."""
    return folder / f"run-{number}"


def find_run_folders(folder: Path) -> list[Path]:
    """The folders of the runs in ``folder`` that hold a result, in the order in which they were run."""
    numbers = [file.parent.name.removeprefix("run-") for file in folder.glob(f"run-*/{RESULT_FILE}")]
    return [run_folder(folder, number) for number in sorted(int(text) for text in numbers if text.isdecimal())]


def read_result(path: Path) -> BenchResult:
    """Reads the result in this folder, or in this ``result.json``. Raises UsageError when the path holds no result.

    Several runs without a joint result (the first of them was not ended) are joined here.
    """
    run_folders = find_run_folders(path)
    if run_folders and not (path / RESULT_FILE).exists():
        return join_runs([_read_file(folder / RESULT_FILE) for folder in run_folders])
    return _read_file(path / RESULT_FILE if path.is_dir() else path)


def _read_file(file: Path) -> BenchResult:
    """Reads the result in this ``result.json``. Raises UsageError when there is none."""
    try:
        if file.stat().st_size > MAX_RESULT_BYTES:
            raise UsageError(f"{file} is too large to be a result")
        document = json.loads(file.read_bytes())
        return result_from_json(document)
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror or error}", hint="`gpumesh bench run --out DIR` makes one"
        ) from None
    except (ValueError, RecursionError) as error:  # RecursionError: JSON that is nested too deep
        raise UsageError(f"{file} is not a result of `gpumesh bench`: {error}") from None


def find_results(folder: Path) -> list[Path]:
    """The subfolders of ``folder`` that hold a result, the latest first."""
    written: dict[Path, float] = {}  # when the result in each subfolder was written
    for pattern, depth in ((f"*/{RESULT_FILE}", 0), (f"*/run-*/{RESULT_FILE}", 1)):
        for file in folder.glob(pattern):
            subfolder = file.parents[depth]
            written[subfolder] = max(written.get(subfolder, 0.0), file.stat().st_mtime)
    return sorted(
        written, key=lambda subfolder: (written[subfolder], subfolder), reverse=True
    )  # of equal times, by name


def find_newest_result(folder: Path) -> Path | None:
    """Returns the subfolder of ``folder`` that holds the latest result; ``None`` if there is no result."""
    return next(iter(find_results(folder)), None)
