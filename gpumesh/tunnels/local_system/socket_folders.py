"""A private folder for the sockets of one connection, and the removal of those whose process is gone.

Who makes one holds a lock on it (``flock`` on the folder itself), which the kernel drops when the process ends, however
it ends. So one that can be locked belongs to nobody. Making one and removing others exclude each other by a lock on the
folder around them: a folder that was just made, and is not locked yet, must not look like one that was left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import environment

_PREFIX = "s"
_NAME = re.compile(_PREFIX + r"[a-z0-9_]{8}")  # as tempfile makes them
# Where an ssh, or who answers its questions, listens. To connect to any other would open a connection on the host.
_LISTENERS = ("c", "n", "ask")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder (0700), gone afterwards with all that is in it. Raises ``GPUMeshError`` when none can be made.

    Its path is short: a Unix socket's may not be long.
    """
    runtime = environment.runtime_dir()
    with _opened(runtime) as around:
        _lock(around, fcntl.LOCK_SH)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runtime))
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def remove_stale_folders(runtime: Path) -> None:
    """Removes the folders below ``runtime`` (a folder of this user's alone) that no living process has made. Raises
    nothing: what cannot be told or removed stays."""
    with contextlib.suppress(OSError), _opened(runtime) as around:
        if not _lock(around, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return  # somebody makes one just now: another time
        with os.scandir(runtime) as entries:
            left = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        for folder in left:
            with contextlib.suppress(OSError):
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        ours = os.fstat(descriptor).st_uid == os.geteuid()
        # A gpumesh before this one holds no lock: its folder is in use while something answers there.
        if ours and _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) and not _answers(folder):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _answers(folder: Path) -> bool:
    for name in _LISTENERS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.setblocking(False)
            try:
                asking.connect(str(folder / name))
            except BlockingIOError:
                return True  # its queue is full
            except OSError:
                continue
            return True
    return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """False: another has it, or it is a file system without such locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        return False
    return True
