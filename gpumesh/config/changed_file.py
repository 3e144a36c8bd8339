"""Looks whether mesh.yaml still says what the running mesh has read from it. Imports yaml only if not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gpumesh.config.comparison import ConfigSnapshot, compare_topologies, describe_bad_file, describe_differences
from gpumesh.config.live_changes import plan_live_changes
from gpumesh.errors import ConfigError
from gpumesh.state import Finding
from gpumesh.topology import Topology


def read_snapshot(path: Path) -> ConfigSnapshot:
    """Reads mesh.yaml for a mesh that starts. Raises ConfigError."""
    from gpumesh.config.mesh_file import reader

    digest = read_digest(path)  # before the text: a change in between is then noticed later, and not missed
    return ConfigSnapshot(reader.load(path), digest)


def read_digest(path: Path) -> str | None:
    """The SHA-256 of the file's bytes, in hexadecimal; ``None`` if there is no file that can be read."""
    try:
        if not path.is_file():  # to open a pipe would block
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


class ChangedFile:
    """Compares the file at ``path`` with ``snapshot``, again and again. ``snapshot`` is what the running mesh has read
    from the file; ``None``: the mesh is of an older version, which does not report it."""

    def __init__(self, path: Path, snapshot: ConfigSnapshot | None) -> None:
        self._path = path
        self._snapshot = snapshot
        self._compared_digest = snapshot.digest if snapshot is not None else None
        self._finding: Finding | None = None  # about the file with ``_compared_digest``

    def __repr__(self) -> str:
        return f"<ChangedFile {self._path} {'same' if self._finding is None else 'changed'}>"

    def find(self) -> Finding | None:
        """The finding about the file as it is now. ``None`` if the file agrees with the running mesh, or if this is not
        known. The file is parsed only if its bytes have changed."""
        if self._snapshot is None or self._snapshot.digest is None:
            return None
        digest = read_digest(self._path)
        if digest != self._compared_digest:
            self._compared_digest = digest
            self._finding = None if digest == self._snapshot.digest else _compare_file(self._path, self._snapshot)
        return self._finding


def _compare_file(path: Path, snapshot: ConfigSnapshot) -> Finding | None:
    """Reads the file, and returns the finding about its differences from ``snapshot``."""
    from gpumesh.config.mesh_file import reader  # imports yaml, which most commands do not need

    try:
        current = reader.load(path)
    except ConfigError as error:  # the file is gone, or is not valid any more
        return describe_bad_file(error)
    return describe_change(snapshot.topology, current)


def describe_change(running: Topology, current: Topology) -> Finding | None:
    """The finding about a file that says ``current`` while its mesh runs with ``running``; ``None``: they are the
    same."""
    plan = plan_live_changes(running, current)
    return describe_differences(compare_topologies(running, current), running.gateway.reload, plan.after_restart)
