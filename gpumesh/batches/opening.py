"""Makes the store of a mesh's batches: a SQLite file, or Redis if mesh.yaml has the section ``redis``."""

from __future__ import annotations

from pathlib import Path

from gpumesh import config
from gpumesh.batches.base import BatchStore
from gpumesh.config.extras import need_extra
from gpumesh.topology import Topology


def create_batch_store(topology: Topology, path: Path) -> BatchStore:
    """The store of the batches of this mesh, for commands and for the mesh itself. ``async with`` opens and closes it.
    ``path``: the SQLite file (``MeshPaths.batches``), for a mesh without ``redis``. Raises GPUMeshError if redis-py is
    needed and not installed."""
    spec = topology.redis
    if spec is None:
        from gpumesh.batches.sqlite.store import SqliteBatchStore

        return SqliteBatchStore(path)
    with need_extra("redis", "`redis:` in mesh.yaml"):
        from gpumesh.batches.redis.store import RedisBatchStore

    return RedisBatchStore(
        spec.url,
        topology.name,
        password=lambda: _read_password(spec.password_env),
        ca_file=spec.ca_file,
        sentinel_password=lambda: _read_password(spec.sentinel_password_env),
    )


def _read_password(variable: str | None) -> str | None:
    return None if variable is None else config.read_secret(variable)
