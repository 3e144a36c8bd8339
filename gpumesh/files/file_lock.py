"""Locks on open files and folders (flock(2)), which the kernel releases when their process ends, however it ends.

So if a lock can be acquired, no living process uses the file. A lock belongs to the open descriptor: closing the
descriptor releases the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def acquire(descriptor: int, *, shared: bool = False) -> None:
    """Waits for the exclusive lock (the shared lock with ``shared``) and takes it. Raises OSError where the system or
    the file system has no such locks."""
    _flock(descriptor, "LOCK_SH" if shared else "LOCK_EX")


def try_acquire(descriptor: int) -> bool:
    """Takes the exclusive lock without waiting. Returns False when another process holds the lock. Raises OSError as
    ``acquire`` does."""
    try:
        _flock(descriptor, "LOCK_EX", "LOCK_NB")
    except BlockingIOError:
        return False
    return True


def release(descriptor: int) -> None:
    """Releases the lock. Raises OSError as ``acquire`` does."""
    _flock(descriptor, "LOCK_UN")


@contextlib.contextmanager
def open_folder(folder: Path, *, follow_links: bool = True) -> Iterator[int]:
    """Yields a descriptor of the folder, which can be locked, and closes it at the end of the block. Raises OSError,
    without ``follow_links`` also when the path is a symbolic link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(folder, flags if follow_links else flags | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the folder's exclusive lock: only one gpumesh process at a time is in such a block for the same folder.
    Raises OSError."""
    with open_folder(folder) as descriptor:
        acquire(descriptor)
        yield


def _flock(descriptor: int, *flag_names: str) -> None:
    """Calls flock(2) with the flags that have these names, such as ``LOCK_EX``. Raises OSError.

    A caller cannot give the flags themselves: on Windows there is no module ``fcntl`` that has them.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    operation = 0
    for name in flag_names:
        operation |= getattr(fcntl, name)
    fcntl.flock(descriptor, operation)
