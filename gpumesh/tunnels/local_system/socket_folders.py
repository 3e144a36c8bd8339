"""Makes a private folder for the sockets of one connection, and removes the folders of processes that have ended.

The process that makes a folder holds a lock on it (file_lock.py). So a folder that can be locked belongs to no living
process. A lock on the parent folder keeps making and removing apart: otherwise a folder that was just made, and is not
locked yet, would look like an old folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import environment
from gpumesh.files import file_lock

_PREFIX = "s"
_NAME = re.compile(_PREFIX + r"[a-z0-9_]{8}")  # the form of the names that tempfile makes
# The sockets at which an ssh master, or our server for its questions, listens. Only these are tried: a connect to
# another socket of the folder would open a forwarded connection on the host.
_PROBED_SOCKETS = ("c", "n", "ask")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Gives the block a new folder (0700), and removes the folder with its content at the end.

    The folder's path is short, because the path of a Unix socket has a limit. Raises ``GPUMeshError`` when no folder
    can be made.
    """
    runtime = environment.runtime_dir()
    with file_lock.open_folder(runtime) as parent:
        # Shared: several processes may make folders at once, but ``remove_stale_folders`` must be alone. A file
        # system may have no locks. Then only the sockets in a folder show whether the folder is in use.
        with contextlib.suppress(OSError):
            file_lock.acquire(parent, shared=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runtime))
        lock_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            file_lock.try_acquire(lock_descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock_descriptor)


def remove_stale_folders(runtime: Path) -> None:
    """Removes the folders in ``runtime`` (which only this user can write to) that belong to no living process.

    Raises nothing. A folder stays if its owner cannot be found out, or if it cannot be removed.
    """
    with contextlib.suppress(OSError), file_lock.open_folder(runtime) as parent:
        if not file_lock.try_acquire(parent):
            return  # another process is just making a folder; the next call removes the old folders
        with os.scandir(runtime) as entries:
            candidates = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        for folder in candidates:
            with contextlib.suppress(OSError):
                _remove_if_stale(folder)


def _remove_if_stale(folder: Path) -> None:
    """Removes the folder if it is ours and no process uses it. Raises OSError."""
    with file_lock.open_folder(folder, follow_links=False) as descriptor:
        is_ours = os.fstat(descriptor).st_uid == os.geteuid()
        # An older gpumesh holds no lock. Its folder is in use while a process listens in it.
        if is_ours and file_lock.try_acquire(descriptor) and not _has_listener(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _has_listener(folder: Path) -> bool:
    """Whether a process listens at one of ``_PROBED_SOCKETS`` in the folder."""
    for name in _PROBED_SOCKETS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(folder / name))
            except BlockingIOError:
                return True  # a process listens, and its queue is full
            except OSError:  # there is no such socket, or nothing listens at it any more
                continue
            return True
    return False
