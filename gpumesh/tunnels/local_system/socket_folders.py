"""A private folder for the sockets of one connection, and the removal of folders whose process is gone.

The process that makes a folder holds a lock on it (file_lock.py). A folder that can be locked belongs to no living
process. Creating a folder and removing old ones exclude each other by a lock on the parent folder: otherwise a folder
that was just made and is not locked yet would look like an old one.
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

from gpumesh import file_lock
from gpumesh.config import environment

_PREFIX = "s"
_NAME = re.compile(_PREFIX + r"[a-z0-9_]{8}")  # as tempfile makes names
# The sockets at which an ssh master or our server for its questions listens. A connect to any other socket in there
# would open a connection on the host.
_LISTENERS = ("c", "n", "ask")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder (0700), which is removed with its content at the end. Raises ``GPUMeshError`` when none can be made.

    Its path is short, because the path of a Unix socket has a limit.
    """
    runtime = environment.runtime_dir()
    with file_lock.open_folder(runtime) as parent:
        # Without locks on this file system, an old folder is recognised by its sockets alone.
        with contextlib.suppress(OSError):
            file_lock.acquire(parent, shared=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runtime))
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            file_lock.try_acquire(held)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def remove_stale_folders(runtime: Path) -> None:
    """Removes the folders in ``runtime`` (which only this user can write to) that belong to no living process.

    Raises nothing: a folder whose owner cannot be found out, or that cannot be removed, stays.
    """
    with contextlib.suppress(OSError), file_lock.open_folder(runtime) as parent:
        if not file_lock.try_acquire(parent):
            return  # another process is just making a folder: the next call removes the old ones
        with os.scandir(runtime) as entries:
            candidates = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        for folder in candidates:
            with contextlib.suppress(OSError):
                _remove_if_stale(folder)


def _remove_if_stale(folder: Path) -> None:
    with file_lock.open_folder(folder, follow_links=False) as descriptor:
        ours = os.fstat(descriptor).st_uid == os.geteuid()
        # An older gpumesh holds no lock: its folder is in use while a process listens in it.
        if ours and file_lock.try_acquire(descriptor) and not _has_listener(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _has_listener(folder: Path) -> bool:
    for name in _LISTENERS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(folder / name))
            except BlockingIOError:
                return True  # its queue is full
            except OSError:
                continue
            return True
    return False
