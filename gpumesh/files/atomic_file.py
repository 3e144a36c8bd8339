"""Writes a file completely or not at all (atomically): to a temporary file, which then takes the target's name.

The temporary file is in the same folder. A process that is killed while it writes leaves its temporary file behind. The
next writer of the same target removes that file. Each writer holds a lock on its temporary file, and the kernel drops
the lock when the process ends, however it ends. So a temporary file that can be locked has no writer any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpumesh.files import file_lock

_RANDOM_SUFFIX = re.compile(r"[a-z0-9_]{8}")  # ``tempfile.mkstemp`` appends it to the prefix


def replace(target: Path, text: str, *, mode: int = 0o600, errors: str = "strict", sync: bool = True) -> None:
    """Makes ``text`` the whole content of the file ``target``. Raises OSError, and then the target is unchanged.

    ``mode`` is the file's mode afterwards, whatever it was before. With ``sync`` the data is on the disk before the
    file gets its name, so that a loss of power leaves no empty file. ``errors`` is the argument of ``open``: what
    happens to characters that UTF-8 cannot encode.
    """
    _write(target, [text.encode("utf-8", errors)], os.replace, mode=mode, sync=sync)


def replace_with_pieces(target: Path, pieces: Iterable[bytes], *, mode: int = 0o600) -> None:
    """As ``replace``, for a file that is too large for memory: its content is the ``pieces``, one after the other."""
    _write(target, pieces, os.replace, mode=mode)


@contextlib.contextmanager
def open_replacement(target: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Opens a file to write to, which takes the place of ``target`` when the block ends. If the block raises, or with
    OSError, the target is unchanged."""
    with _open_temporary(target, os.replace, mode=mode) as file:
        yield file


def create(target: Path, text: str, *, mode: int = 0o600) -> None:
    """Makes a new file ``target`` with the content ``text``. Raises FileExistsError when the file exists, also when
    another process makes it meanwhile; raises OSError as ``replace`` does."""
    _write(target, [text.encode()], os.link, mode=mode)


def _write(
    target: Path,
    pieces: Iterable[bytes],
    take_name: Callable[[str, Path], None],
    *,
    mode: int,
    sync: bool = True,
) -> None:
    """Writes the ``pieces`` as ``_open_temporary`` describes it."""
    with _open_temporary(target, take_name, mode=mode, sync=sync) as file:
        file.writelines(pieces)


@contextlib.contextmanager
def _open_temporary(
    target: Path, take_name: Callable[[str, Path], None], *, mode: int, sync: bool = True
) -> Iterator[BinaryIO]:
    """Opens a temporary file to write to. At the end of the block calls ``take_name(temporary, target)``, which gives
    the file the name of the target: ``os.replace``, or ``os.link``, which fails if the target exists."""
    prefix = f".{target.name}.gpumesh-"  # no other program gives its files such names
    _remove_stale_files(target.parent, prefix)
    descriptor, temporary = _make_locked_file(target.parent, prefix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.chmod(temporary, mode)
            if sync:
                os.fsync(file.fileno())
            take_name(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # os.replace has moved the file; os.link leaves its first name
            os.unlink(temporary)


def _make_locked_file(folder: Path, prefix: str) -> tuple[int, str]:
    """Makes a new file with mode 0600 and locks it. Returns its descriptor and its path, in this order.

    Before the file is locked, another process may remove it as stale. Then this function makes another file.
    """
    while True:
        descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
        _lock(descriptor, wait=True)  # a process that looks for stale files holds the lock for an instant
        with contextlib.suppress(FileNotFoundError):  # from os.stat: the file was removed before we locked it
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # it is still there, and not another one
                return descriptor, path
        os.close(descriptor)


def _remove_stale_files(folder: Path, prefix: str) -> None:
    """Removes the temporary files in ``folder`` whose writer has ended. Files of other users stay. Raises no error."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and _RANDOM_SUFFIX.fullmatch(entry.name.removeprefix(prefix)):
                with contextlib.suppress(OSError):
                    _remove_if_stale(entry.path)


def _remove_if_stale(path: str) -> None:
    """Removes the file if it is a regular file of our user and no process holds its lock. Raises OSError."""
    # Another user may have put something else there. O_NOFOLLOW refuses a link. O_NONBLOCK is for a FIFO: without it,
    # opening a FIFO waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        belongs_to_us = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()  # Windows has no user numbers
        if stat.S_ISREG(status.st_mode) and belongs_to_us and _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed. Returns whether the lock was taken.

    Returns False when another process holds the lock (never with ``wait``), or when the system has no such locks.
    """
    try:
        if wait:
            file_lock.acquire(descriptor)
            return True
        return file_lock.try_acquire(descriptor)
    except OSError:  # neither the system nor the file system has such locks
        return False
