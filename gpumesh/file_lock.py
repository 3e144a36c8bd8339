"""Locks on open files and folders (flock(2)). The kernel releases a lock when its process ends, however it ends.

So a lock that can be acquired shows that no living process uses the file. A lock belongs to the open descriptor:
closing the descriptor releases it.
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
    """Waits for the lock and takes it: the exclusive lock, or the shared one. Raises OSError where the system or the
    file system has no such locks."""
    _flock(descriptor, "LOCK_SH" if shared else "LOCK_EX")


def try_acquire(descriptor: int) -> bool:
    """Takes the exclusive lock without waiting. Returns False when another process holds it. Raises OSError as
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
    """A descriptor of a folder, which can be locked. Raises OSError; without ``follow_links`` also for a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(folder, flags if follow_links else flags | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Inside the block, no other process of ours is in such a block for the same folder. Raises OSError."""
    with open_folder(folder) as descriptor:
        acquire(descriptor)
        yield


def _flock(descriptor: int, *flag_names: str) -> None:
    """The flags come as names, because there is no ``fcntl`` to take them from on Windows."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    operation = 0
    for name in flag_names:
        operation |= getattr(fcntl, name)
    fcntl.flock(descriptor, operation)
