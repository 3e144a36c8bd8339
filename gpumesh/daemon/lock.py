"""One mesh for one mesh.yaml: an flock on a file that holds the owner's pid.

The kernel drops the lock when its process ends, however it ends; so a lock that can be taken means that whatever else
lies in the folder is stale. The lock is not released before the process ends: who waits for it waits for that.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Self

from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning

INSTANTS, INSTANT_S = 5, 0.01


class MeshLock:
    """Held from ``acquire`` to ``release`` or to the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, paths: MeshPaths) -> Self:
        """Raises MeshAlreadyRunning, naming the pid, when another process has it."""
        while True:
            paths.create_folder()
            try:
                descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # another `down` took the folder away in between
            except OSError as error:
                raise _unusable(paths, error) from error
            try:
                if not _try_lock_patiently(descriptor):
                    raise MeshAlreadyRunning(
                        f"the mesh of {paths.config} runs already{_words(_pid_in(descriptor))}",
                        hint="`gpumesh status` shows it, `gpumesh down` stops it",
                    )
                if _is_at(descriptor, paths.lock):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return cls(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the file was unlinked by its last owner before we had the lock: make a new one

    def restore_file(self, paths: MeshPaths) -> None:
        """Seen to now and then: a system clears /tmp of what is old, and takes a runtime folder away at logout.

        Makes the file anew where it is gone. Raises MeshAlreadyRunning when another mesh has taken its place since,
        and GPUMeshError where it cannot be made (now).
        """
        if self.still_owns(paths):
            os.utime(self._descriptor)
            return
        # The old one stays open, and locked: a `down` may be waiting for it.
        self._descriptor = type(self).acquire(paths)._descriptor

    def still_owns(self, paths: MeshPaths) -> bool:
        return _is_at(self._descriptor, paths.lock)

    def release(self) -> None:
        os.close(self._descriptor)


class LockWatch:
    """Another process's lock, opened while it holds it: to learn its pid and when it has ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, paths: MeshPaths) -> Self | None:
        """``None`` when there is no lock file."""
        try:
            return cls(os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(paths, error) from error

    @property
    def held(self) -> bool:
        """Asking takes the lock for an instant when it is free."""
        if not _try_lock(self._descriptor):
            return True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    @property
    def pid(self) -> int | None:
        return _pid_in(self._descriptor)

    def remove_if_stale(self, paths: MeshPaths) -> bool:
        """If its owner is gone, removes what it left behind. True when nobody holds the lock."""
        if not _try_lock(self._descriptor):
            return False
        if _is_at(self._descriptor, paths.lock):
            paths.remove_files()
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_patiently(descriptor: int) -> bool:
    """Who only asks whether a mesh runs (``held``, ``sweep``) has the lock for an instant: that is no mesh."""
    for _ in range(INSTANTS):
        if _try_lock(descriptor):
            return True
        time.sleep(INSTANT_S)
    return _try_lock(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() and text.isascii() else None


def _unusable(paths: MeshPaths, error: OSError) -> GPUMeshError:
    return GPUMeshError(f"cannot use the lock file {paths.lock}: {error.strerror}", hint="look at what is there")


def _words(pid: int | None) -> str:
    return "" if pid is None else f" (pid {pid})"
