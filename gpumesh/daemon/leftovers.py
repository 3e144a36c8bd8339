"""What meshes leave that are killed: their sockets and locks, and the folders of their connections. Whoever starts a
mesh of the same user, of whatever mesh.yaml, takes it away. Only what belongs to no living process: that is told by
locks, which end with who holds them, never by age."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from gpumesh.config import environment
from gpumesh.daemon.lock import LockWatch
from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError
from gpumesh.tunnels.local_system import socket_folders

_MESH = re.compile(r"[0-9a-f]{16}")  # as paths.for_config makes them


def remove_leftovers() -> None:
    """Raises nothing: what cannot be told or removed stays."""
    for runtime in environment.runtime_dirs():
        socket_folders.remove_stale_folders(runtime)
        with contextlib.suppress(OSError, GPUMeshError):
            with os.scandir(runtime) as entries:
                meshes = [Path(entry.path) for entry in entries if _MESH.fullmatch(entry.name)]
            for folder in meshes:
                _sweep_mesh(folder)


def _sweep_mesh(folder: Path) -> None:
    log = environment.state_dir() / "logs" / f"{folder.name}.jsonl"
    paths = MeshPaths(config=folder, folder=folder, log=log)
    with contextlib.suppress(OSError, GPUMeshError):
        watch = LockWatch.open(paths)
        if watch is None:
            folder.rmdir()  # whoever makes one comes back if it is gone; one with something in it stays
            return
        with watch:
            watch.remove_if_stale(paths)
