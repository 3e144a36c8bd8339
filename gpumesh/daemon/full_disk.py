"""Finds the folder that is full. The system's error "No space left on device" names no file when a write has failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gpumesh.config import environment
from gpumesh.errors import GPUMeshError

FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})


def own_folders() -> list[Path]:
    """The folders in which gpumesh writes: those of sockets and of logs. Without a folder that cannot be made."""
    folders = []
    for find_folder in (environment.runtime_dir, environment.state_dir):
        with suppress(OSError, GPUMeshError):
            folders.append(find_folder())
    return folders


def full_folders(folders: Iterable[Path]) -> list[Path]:
    """Those of the folders whose file system has no room for one more block, or for one more file."""
    return [folder for folder in folders if _is_full(folder)]


def describe_full_folders(error: OSError) -> str:
    """`` in FOLDER`` for an error of FULL_ERRORS that names no file, if a folder of gpumesh is full; else empty."""
    if error.errno not in FULL_ERRORS or error.filename:
        return ""
    names = " and ".join(map(str, full_folders(own_folders())))
    return f" in {names}" if names else ""


def _is_full(folder: Path) -> bool:
    """Whether the disk of the folder has no room, or no room for another file."""
    try:
        system = os.statvfs(folder)
    except OSError:  # the folder has just gone, or cannot be asked
        return False
    has_no_file = system.f_files > 0 and system.f_favail == 0  # some file systems count no files
    return system.f_bavail == 0 or has_no_file
