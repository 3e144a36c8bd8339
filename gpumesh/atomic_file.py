"""Writes a file whole or not at all: into a temporary file in the same folder, which then takes the target's name.

A process that is killed in between leaves its temporary file behind. The next writer of that file removes it. Each
writer holds a lock on its temporary file, and the kernel drops that lock when the process ends, however it ends: so a
temporary file that can be locked belongs to nobody.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpumesh import file_lock

_PREFIX = "{}.gpumesh-"  # no other program names files like that
_RANDOM = re.compile(r"[a-z0-9_]{8}")  # the part that tempfile adds


def replace(target: Path, text: str, *, mode: int = 0o600, errors: str = "strict", sync: bool = True) -> None:
    """Makes ``text`` the content of the file. Raises OSError; then the target is unchanged. With ``sync`` the new
    content survives a loss of power."""
    _write(target, text, os.replace, mode=mode, errors=errors, sync=sync)


def create(target: Path, text: str, *, mode: int = 0o600) -> None:
    """As ``replace``, but never over an existing file. Raises FileExistsError, also when another process has made the
    file meanwhile."""
    _write(target, text, os.link, mode=mode)


def _write(
    target: Path,
    text: str,
    take_name: Callable[[str, Path], None],
    *,
    mode: int,
    errors: str = "strict",
    sync: bool = True,
) -> None:
    prefix = _PREFIX.format(f".{target.name}")
    _remove_stale_files(target.parent, prefix)
    descriptor, temporary = _make_locked_file(target.parent, prefix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors=errors, newline="") as file:
            file.write(text)
            file.flush()
            os.chmod(temporary, mode)
            if sync:
                os.fsync(file.fileno())
            take_name(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # os.replace has moved it
            os.unlink(temporary)


def _make_locked_file(folder: Path, prefix: str) -> tuple[int, str]:
    """A new file with mode 0600, locked. Makes another file when this one was removed before it was locked."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=folder)
        _lock(descriptor, wait=True)  # a process that looks for stale files holds the lock for an instant
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                return descriptor, name
        os.close(descriptor)


def _remove_stale_files(folder: Path, prefix: str) -> None:
    """Files of other users stay, and files that are still being written."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and _RANDOM.fullmatch(entry.name.removeprefix(prefix)):
                with contextlib.suppress(OSError):
                    _remove_if_stale(entry.path)


def _remove_if_stale(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        is_ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if stat.S_ISREG(status.st_mode) and is_ours and _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed. False when the lock is held, or when there are no such locks."""
    try:
        if wait:
            file_lock.acquire(descriptor)
            return True
        return file_lock.try_acquire(descriptor)
    except OSError:  # neither the system nor the file system has such locks
        return False
