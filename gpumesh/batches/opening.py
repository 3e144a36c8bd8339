"""Makes the store of a mesh's batches: a SQLite file, or Redis if mesh.yaml has the section ``redis``."""

from __future__ import annotations

from pathlib import Path

from gpumesh.batches.base import BatchStore
from gpumesh.topology import Topology


def create_batch_store(topology: Topology, path: Path) -> BatchStore:
    """The store of the batches of this mesh, for commands and for the mesh itself. ``async with`` opens and closes it.
    ``path``: the SQLite file (``MeshPaths.batches``)."""
    from gpumesh.batches.sqlite.store import SqliteBatchStore

    del topology  # its section ``redis`` will choose the other store

    return SqliteBatchStore(path)
