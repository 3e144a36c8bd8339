"""At most one mesh runs for each mesh.yaml: its process holds an flock on a file that contains its pid.

A second ``up`` finds out here that a mesh runs already (``MeshLock.acquire``). ``LockWatch`` looks at the lock of
another process: the pid of that process, and whether it still holds the lock.

The kernel drops the lock when its process ends, however it ends. So when the lock can be taken, everything else in the
folder is stale. A mesh holds its lock until its process ends. So a command that waits for the lock waits for the end of
the mesh's process.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning
from gpumesh.files import file_lock

LOCK_RETRIES = 5
LOCK_RETRY_S = 0.01  # between two tries; other commands hold the lock for a much shorter time


class MeshLock:
    """The lock of a mesh in this process. It is held from ``acquire`` to ``release``, or to the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<MeshLock fd {self._descriptor} pid {os.getpid()}>"

    @classmethod
    def acquire(cls, paths: MeshPaths) -> Self:
        """Takes the mesh's lock and writes our pid into the lock file. Makes the folder and the file if necessary.

        Raises MeshAlreadyRunning, which names the pid, when another process holds the lock, and GPUMeshError when the
        file cannot be used.
        """
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
            # The last owner unlinked the file after we had opened it, so nobody else would see our lock: open it again.
            os.close(descriptor)

    def restore_file(self, paths: MeshPaths) -> None:
        """Makes the lock file again if it is gone. Must be called every few seconds: a system clears old files from
        /tmp, and removes a runtime folder at logout.

        Raises MeshAlreadyRunning when another mesh has made and locked the file meanwhile, and GPUMeshError when the
        file cannot be made now.
        """
        if self.still_owns(paths):
            os.utime(self._descriptor)  # makes the file new again, so that the system does not clear it
            return
        # The old file stays open and locked: a `down` may be waiting for its lock.
        self._descriptor = type(self).acquire(paths)._descriptor

    def still_owns(self, paths: MeshPaths) -> bool:
        """Whether the lock file at its path is still the file that this object has locked."""
        return _is_file_at(self._descriptor, paths.lock)

    def release(self) -> None:
        os.close(self._descriptor)


class LockWatch:
    """The lock file of another process. That process may hold the lock, or may have ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<LockWatch fd {self._descriptor} of pid {self.pid}>"

    @classmethod
    def open(cls, paths: MeshPaths) -> Self | None:
        """Opens the mesh's lock file. Returns ``None`` when there is no such file. Raises GPUMeshError when the file
        cannot be opened."""
        try:
            return cls(os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _lock_file_error(paths, error) from error

    @property
    def held(self) -> bool:
        """Whether a process holds the lock. If no process holds it, this takes the lock for an instant."""
        if not file_lock.try_acquire(self._descriptor):
            return True
        file_lock.release(self._descriptor)
        return False

    @property
    def pid(self) -> int | None:
        """The pid in the lock file; ``None`` when the file holds no pid yet."""
        return _read_pid(self._descriptor)

    def remove_if_stale(self, paths: MeshPaths) -> bool:
        """Removes the mesh's files if no process holds the lock. Returns False if a process holds it."""
        if not file_lock.try_acquire(self._descriptor):
            return False
        if _is_file_at(self._descriptor, paths.lock):  # otherwise the files at these paths belong to a newer mesh
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
    """Takes the lock, after a few tries if necessary. Returns False when another process still holds it then.

    A command that asks whether a mesh runs (``held``, ``remove_if_stale``) is no mesh, but has the lock for an instant.
    """
    for _ in range(LOCK_RETRIES):
        if file_lock.try_acquire(descriptor):
            return True
        time.sleep(LOCK_RETRY_S)
    return file_lock.try_acquire(descriptor)


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the file at ``path``."""
    try:
        status_at_path = path.stat()
    except FileNotFoundError:  # the file at the path was removed, although we have it open
        return False
    return os.path.samestat(os.fstat(descriptor), status_at_path)


def _read_pid(descriptor: int) -> int | None:
    """Returns the pid in an open lock file; ``None`` when the file is empty or holds anything else."""
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() and text.isascii() else None


def _lock_file_error(paths: MeshPaths, error: OSError) -> GPUMeshError:
    return GPUMeshError(f"cannot use the lock file {paths.lock}: {error.strerror}", hint="look at what is there")


def _pid_suffix(pid: int | None) -> str:
    return "" if pid is None else f" (pid {pid})"
