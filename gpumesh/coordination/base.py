"""What the mesh sees of the other gateways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Coordination(Protocol):
    """Keys name GPUs, the same for every gateway that reaches them (``mesh.node.Node.key``)."""

    @property
    def problem(self) -> str | None:
        """Why this gateway is alone although it should not be; ``None`` when all is as it should be."""

    def publish_loads(self, loads: Mapping[str, int]) -> None:
        """What this gateway has in flight now, by key; keys without load may be left out. Cheap."""

    def other_gateways_load(self, key: str) -> int:
        """What all other gateways together have in flight there, as far as is known."""

    async def run(self) -> None:
        """Keeps in touch until cancelled. Never raises on another's account."""
