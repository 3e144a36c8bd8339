"""Asks the Ollama of a pool's members to unload its models, so that the pool can use their memory."""

from __future__ import annotations

import asyncio
import logging

from gpumesh.errors import GPUMeshError
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.fleet_store import FleetStore

log = logging.getLogger(__name__)

UNLOAD_TIMEOUT_S = 60.0


async def unload_models(mesh: Mesh, pool: str, nodes: tuple[str, ...]) -> None:
    """Unloads all models of these nodes' servers. What a server refuses is logged: the plan that follows then says that
    the pool does not fit."""
    await asyncio.gather(*(_unload_from(mesh, pool, node) for node in nodes))


async def _unload_from(mesh: Mesh, pool: str, node: str) -> None:
    for model in mesh.fleet.find_node(node).state(queued=0).backend.loaded:
        log.info("pool %s: %s unloads %s", pool, node, model.name, extra={"event": "pool", "node": node})
        try:
            results = await FleetStore(mesh).unload(model.name, node, allowed=None, timeout_s=UNLOAD_TIMEOUT_S)
        except GPUMeshError as error:
            log.warning("pool %s: %s cannot be asked to unload %s: %s", pool, node, model.name, error)
            continue
        for result in results:
            if not result.done:
                reason = result.error_text or result.error
                log.warning("pool %s: %s does not unload %s: %s", pool, node, model.name, reason)
