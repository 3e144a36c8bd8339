"""Removes the files that killed meshes left behind: their sockets and locks, and the folders of their connections.

Each start of a mesh does this for all meshes of the same user. Only files that belong to no living process are removed.
Their locks show that, not their age: a lock ends with its process.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from gpumesh.config import environment
from gpumesh.daemon.mesh_lock import LockWatch
from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError
from gpumesh.tunnels.local_system import socket_folders

_MESH_FOLDER = re.compile(r"[0-9a-f]{16}")  # the names that paths.for_config makes


def remove_leftovers() -> None:
    """Removes the stale files in all runtime folders of this user. Raises no error: a file that cannot be checked or
    removed stays."""
    for runtime in environment.runtime_dirs():
        socket_folders.remove_stale_folders(runtime)
        with contextlib.suppress(OSError, GPUMeshError):
            with os.scandir(runtime) as entries:
                folders = [Path(entry.path) for entry in entries if _MESH_FOLDER.fullmatch(entry.name)]
            for folder in folders:
                _remove_stale_mesh(folder)


def _remove_stale_mesh(folder: Path) -> None:
    """Removes the runtime folder of a mesh if its process has ended. A file that cannot be removed stays."""
    log = environment.state_dir() / "logs" / f"{folder.name}.jsonl"
    paths = MeshPaths(config=folder, folder=folder, log=log)  # its mesh.yaml is not known, and not needed here
    with contextlib.suppress(OSError, GPUMeshError):
        watch = LockWatch.open(paths)
        if watch is None:
            folder.rmdir()  # a starting mesh makes its folder again; a folder with files in it stays
            return
        with watch:
            watch.remove_if_stale(paths)
