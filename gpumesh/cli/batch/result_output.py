"""Where `batch results` writes: to stdout, to a file that is there when it is whole, or to a file that grows."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gpumesh.cli.views.safe_text import safe_json_line
from gpumesh.errors import UsageError
from gpumesh.files import atomic_file

WriteLines = Callable[[Sequence[bytes]], None]
"""Writes lines without line breaks. Raises OSError."""


@contextmanager
def open_result_output(name: str | None, *, force: bool, grows: bool) -> Iterator[WriteLines]:
    """Opens the file ``name``; ``None``: stdout. A file gets its name at the end of the block, when all results are in
    it; with ``grows`` each result is in it as soon as it is written. Raises UsageError if it cannot be written, and if
    it has something already and ``force`` is false; OSError with its name if a write has failed."""
    if name is None:
        yield _write_to_stdout
        return
    path = Path(name)
    is_regular, mode = _look_at(path, force=force)
    try:
        if grows or not is_regular:
            with open(path, "wb", opener=lambda file, flags: os.open(file, flags, mode)) as growing_file:
                yield lambda lines: _write(growing_file, lines)
        else:
            # Where a link points to: the link itself is never replaced.
            with atomic_file.open_replacement(Path(os.path.realpath(path)), mode=mode) as file:
                yield lambda lines: _write(file, lines)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UsageError(f"cannot write {name}: {error.strerror}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, name) from error  # the system names no file if a write has failed


def _look_at(path: Path, *, force: bool) -> tuple[bool, int]:
    """Whether it is a regular file or none yet, and the mode that it is to have. Raises UsageError as
    ``open_result_output`` does."""
    umask = os.umask(0)  # the only call that returns the umask also sets it, so it is set back
    os.umask(umask)
    try:
        status = path.stat()
    except OSError:  # it is not there: opening it says what else is wrong
        return True, 0o666 & ~umask
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is a folder", hint="-o names a file")
    is_regular = stat.S_ISREG(status.st_mode)
    if is_regular and status.st_size and not force:
        raise UsageError(f"{path} is there already", hint="--force overwrites it")
    return is_regular, stat.S_IMODE(status.st_mode)


def _write(file: BinaryIO, lines: Sequence[bytes]) -> None:
    file.write(b"".join(line + b"\n" for line in lines))
    file.flush()


def _write_to_stdout(lines: Sequence[bytes]) -> None:
    """Answers come from servers: nothing in them may act on a terminal."""
    sys.stdout.write("".join(f"{safe_json_line(line.decode('utf-8', 'replace'))}\n" for line in lines))
    sys.stdout.flush()
