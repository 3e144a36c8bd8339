"""What a command's error becomes: one sentence and a hint on stderr, and the exit code. Which errors are expected."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer

from gpumesh.errors import ConfigError, ExitCode, GPUMeshError

# Errors of the system, with hints. The disk, the permissions and the limits are outside of this program.
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
        # The reader of our output is gone, or there is no room for it. Python would try again with what is buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            where = f"{error.filename}: " if error.filename else ""
            hint = _SYSTEM_ERRORS.get(error.errno or 0, "")
            print_error(GPUMeshError(f"{where}{(error.strerror or str(error)).lower()}", hint=hint))
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
    """One sentence that says what is wrong and where, and a hint. The problems of a ConfigError are one to a line."""
    from gpumesh.cli.views.safe_text import clean_text

    node = f"{error.node}: " if error.node and error.node not in error.message else ""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        from gpumesh.config.mesh_file.reader import MAX_PROBLEMS

        more = len(error.problems) > MAX_PROBLEMS  # the last problem says how many are left out
        count = f"more than {MAX_PROBLEMS}" if more else len(error.problems)
        lines = [f"error: {count} problems in the configuration", *map(str, error.problems)]
    else:
        lines = [f"error: {node}{error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    typer.echo(clean_text("\n".join(lines)), err=True)
