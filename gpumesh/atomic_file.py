"""A file that is replaced whole or not at all: written beside its place, then renamed over it.

Who is killed in between leaves what was written beside. The next who writes that file takes it away: each holds a lock
on its own as long as it writes, which the kernel drops when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

_NAME = "{}.gpumesh-"  # of no file of anybody else's
_RANDOM = re.compile(r"[a-z0-9_]{8}")  # as tempfile has it


def replace(target: Path, text: str, *, mode: int = 0o600, errors: str = "strict", sync: bool = True) -> None:
    """Raises OSError; then the target is as it was. ``sync``: it is there even after a loss of power."""
    prefix = _NAME.format(f".{target.name}")
    _sweep(target.parent, prefix)
    descriptor, beside = _made(target.parent, prefix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors=errors, newline="") as file:
            file.write(text)
            file.flush()
            os.chmod(beside, mode)
            if sync:
                os.fsync(file.fileno())
            os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _made(folder: Path, prefix: str) -> tuple[int, str]:
    """A new file (0600), locked. One that was swept before it was locked is made anew."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=folder)
        _take(descriptor, wait=True)  # for who sweeps it, an instant
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                return descriptor, name
        os.close(descriptor)


def _sweep(folder: Path, prefix: str) -> None:
    """What is of another user, or still being written, stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and _RANDOM.fullmatch(entry.name.removeprefix(prefix)):
                with contextlib.suppress(OSError):
                    _remove_if_left(entry.path)


def _remove_if_left(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(descriptor)
        ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
        if stat.S_ISREG(found.st_mode) and ours and _take(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _take(descriptor: int, *, wait: bool = False) -> bool:
    """The lock on an open file, until it is closed; whether it was had. Never where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without them
        return False
    return True
