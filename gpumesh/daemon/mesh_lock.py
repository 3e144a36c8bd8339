"""At most one mesh runs for each mesh.yaml: its process holds an flock on a file that contains its pid.

A second ``up`` finds out here that a mesh runs already (``MeshLock.acquire``). ``LockWatch`` looks at the lock of
another process: its pid, and whether it is still held.

The kernel drops the lock when its process ends, however it ends. So when the lock can be taken, everything else in the
folder is stale. A mesh holds its lock until its process ends: a process that waits for the lock waits for that.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

from gpumesh import file_lock
from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning

LOCK_RETRIES, LOCK_RETRY_S = 5, 0.01


class MeshLock:
    """The lock of a mesh in this process. It is held from ``acquire`` to ``release``, or to the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<MeshLock fd {self._descriptor} pid {os.getpid()}>"

    @classmethod
    def acquire(cls, paths: MeshPaths) -> Self:
        """Raises MeshAlreadyRunning, which names the pid, when another process holds the lock."""
        while True:
            paths.create_folder()
            try:
                descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # a `down` removed the folder after we made it
            except OSError as error:
                raise _lock_file_error(paths, error) from error
            try:
                if not _try_lock_with_retries(descriptor):
                    raise MeshAlreadyRunning(
                        f"the mesh of {paths.config} runs already{_pid_suffix(_read_pid(descriptor))}",
                        hint="`gpumesh status` shows it, `gpumesh down` stops it",
                    )
                if _is_file_at(descriptor, paths.lock):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return cls(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its last owner unlinked the file before we had the lock: make a new file

    def restore_file(self, paths: MeshPaths) -> None:
        """Makes the lock file anew if it is gone. Call it now and then: a system clears old files from /tmp, and
        removes a runtime folder at logout.

        Raises MeshAlreadyRunning when another mesh has made and locked the file meanwhile, and GPUMeshError when the
        file cannot be made now.
        """
        if self.still_owns(paths):
            os.utime(self._descriptor)  # a file that is not old is not cleared
            return
        # The old file stays open and locked: a `down` may be waiting for it.
        self._descriptor = type(self).acquire(paths)._descriptor

    def still_owns(self, paths: MeshPaths) -> bool:
        """Whether the lock file is still the file that this lock is on."""
        return _is_file_at(self._descriptor, paths.lock)

    def release(self) -> None:
        os.close(self._descriptor)


class LockWatch:
    """The lock of another process, opened while that process may hold it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<LockWatch fd {self._descriptor} of pid {self.pid}>"

    @classmethod
    def open(cls, paths: MeshPaths) -> Self | None:
        """``None`` when there is no lock file. Raises GPUMeshError when it cannot be opened."""
        try:
            return cls(os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _lock_file_error(paths, error) from error

    @property
    def held(self) -> bool:
        """Whether a process holds the lock. To find out, this takes a free lock for an instant."""
        if not file_lock.try_acquire(self._descriptor):
            return True
        file_lock.release(self._descriptor)
        return False

    @property
    def pid(self) -> int | None:
        return _read_pid(self._descriptor)

    def remove_if_stale(self, paths: MeshPaths) -> bool:
        """Removes the files of an owner that is gone. Returns True when no process holds the lock."""
        if not file_lock.try_acquire(self._descriptor):
            return False
        if _is_file_at(self._descriptor, paths.lock):
            paths.remove_files()
        file_lock.release(self._descriptor)
        return True

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _try_lock_with_retries(descriptor: int) -> bool:
    """Takes the lock, if necessary at the second or third try: a command that asks whether a mesh runs (``held``,
    ``remove_if_stale``) has the lock for an instant, but is no mesh. Returns False when the lock stays held."""
    for _ in range(LOCK_RETRIES):
        if file_lock.try_acquire(descriptor):
            return True
        time.sleep(LOCK_RETRY_S)
    return file_lock.try_acquire(descriptor)


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the file at that path."""
    try:
        at_path = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), at_path)


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() and text.isascii() else None


def _lock_file_error(paths: MeshPaths, error: OSError) -> GPUMeshError:
    return GPUMeshError(f"cannot use the lock file {paths.lock}: {error.strerror}", hint="look at what is there")


def _pid_suffix(pid: int | None) -> str:
    return "" if pid is None else f" (pid {pid})"
