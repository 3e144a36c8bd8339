"""Turns the error of a command into one sentence and a hint on stderr, and an exit code, if the error is expected."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer

from gpumesh.errors import ConfigError, ExitCode, GPUMeshError

# The numbers of the system's errors that are expected, with hints for a person (empty: no hint). Disk, permissions and
# limits are outside of this program.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "`ulimit -f unlimited` allows longer files",
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
    if isinstance(error, (GPUMeshError, BrokenPipeError, KeyboardInterrupt)):
        return True
    return isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS


def exit_with(error: BaseException) -> NoReturn:
    """Prints an expected error (``is_expected``), and ends the process with its exit code. KeyboardInterrupt exits with
    130, and prints nothing."""
    if isinstance(error, GPUMeshError):
        print_error(error)
        sys.exit(int(error.exit_code))
    if isinstance(error, OSError):
        _exit_after_system_error(error)
    sys.exit(int(ExitCode.INTERRUPTED))  # KeyboardInterrupt


def _exit_after_system_error(error: OSError) -> NoReturn:
    """Prints the error, unless the reader of our output has gone (BrokenPipeError), and ends the process."""
    from gpumesh.daemon.full_disk import describe_full_folders

    # When Python exits, it writes its buffer of stdout once more. If stdout is the file that failed, that would fail
    # again. So stdout becomes /dev/null, which takes the buffer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        file_prefix = f"{error.filename}: " if error.filename else ""
        reason = (error.strerror or str(error)).lower() + describe_full_folders(error)
        hint = _SYSTEM_ERRORS.get(error.errno or 0, "")  # 0 is the number of no error
        print_error(GPUMeshError(f"{file_prefix}{reason}", hint=hint))
    sys.exit(int(ExitCode.FAILED))


def flatten_group(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yields the single errors of a group and of the groups inside it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from flatten_group(error)
        else:
            yield error


def print_error(error: GPUMeshError) -> None:
    """Prints one sentence that says what is wrong and where, then a hint, to stderr. For a ConfigError with several
    problems it prints a line for each problem."""
    from gpumesh.cli.views.safe_text import clean_text

    if isinstance(error, ConfigError) and len(error.problems) > 1:
        from gpumesh.config.mesh_file.reader import MAX_PROBLEMS

        # If there are more than MAX_PROBLEMS, the last problem of the list only says how many are left out.
        is_cut = len(error.problems) > MAX_PROBLEMS
        count = f"more than {MAX_PROBLEMS}" if is_cut else len(error.problems)
        lines = [f"error: {count} problems in the configuration", *map(str, error.problems)]
    else:
        # The node's name comes first, unless the message names the node itself.
        node_prefix = f"{error.node}: " if error.node and error.node not in error.message else ""
        lines = [f"error: {node_prefix}{error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    typer.echo(clean_text("\n".join(lines)), err=True)
