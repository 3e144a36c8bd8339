"""``PoolPlanner``: plans a pool from what its hosts offer now."""

from __future__ import annotations

from gpumesh.errors import PoolError
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan


class PoolPlanner:
    """Asks the members of a pool through the tunnels of ``mesh``."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def plan(self, spec: PoolSpec) -> PoolPlan:
        """Returns the plan, which may say that the pool does not fit. Raises PoolError."""
        raise PoolError(f"pool {spec.name} cannot be planned yet")
