"""``Reloader``: lets a running mesh take over what its mesh.yaml says now."""

from __future__ import annotations

from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.errors import GPUMeshError


class Reloader:
    """``snapshot`` is what the mesh has taken over from its file."""

    def __init__(self, snapshot: ConfigSnapshot) -> None:
        self.snapshot = snapshot

    async def reload(self) -> ReloadReport:
        raise GPUMeshError("the running mesh cannot take over changes yet")
