"""Turns the error of a command into one sentence and a hint on stderr, and an exit code, if the error is expected."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer

from gpumesh.errors import ConfigError, ExitCode, GPUMeshError

# The errors of the system that are expected, with hints: disk, permissions and limits are outside of this program.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "",
    errno.EIO: "",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EMFILE: "`ulimit -n 4096` allows more open files",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
}


def is_expected(error: BaseException) -> bool:
    """Whether a person, a host or the system caused the error: then a sentence is shown, and no traceback."""
    return isinstance(error, (GPUMeshError, BrokenPipeError, KeyboardInterrupt)) or (
        isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS
    )


def exit_with(error: BaseException) -> NoReturn:
    """Prints the error and ends the process. KeyboardInterrupt exits with 130."""
    if isinstance(error, GPUMeshError):
        print_error(error)
        sys.exit(int(error.exit_code))
    if isinstance(error, OSError):
        # The reader of our output is gone, or the disk is full. When Python exits, it writes its buffer once more: that
        # must go to a file that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            file_prefix = f"{error.filename}: " if error.filename else ""
            hint = _SYSTEM_ERRORS.get(error.errno or 0, "")
            print_error(GPUMeshError(f"{file_prefix}{(error.strerror or str(error)).lower()}", hint=hint))
        sys.exit(int(ExitCode.FAILED))
    sys.exit(int(ExitCode.INTERRUPTED))


def flatten_group(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The errors of a group and of the groups inside it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from flatten_group(error)
        else:
            yield error


def print_error(error: GPUMeshError) -> None:
    """Prints one sentence that says what is wrong and where, and a hint. A ConfigError has a line for each problem."""
    from gpumesh.cli.views.safe_text import clean_text

    node_prefix = f"{error.node}: " if error.node and error.node not in error.message else ""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        from gpumesh.config.mesh_file.reader import MAX_PROBLEMS

        # If there are more than MAX_PROBLEMS, the last one only says how many are left out.
        is_cut = len(error.problems) > MAX_PROBLEMS
        count = f"more than {MAX_PROBLEMS}" if is_cut else len(error.problems)
        lines = [f"error: {count} problems in the configuration", *map(str, error.problems)]
    else:
        lines = [f"error: {node_prefix}{error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    typer.echo(clean_text("\n".join(lines)), err=True)
