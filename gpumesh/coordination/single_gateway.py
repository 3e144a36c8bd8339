"""``SingleGateway``: the coordination of a mesh without ``redis`` in mesh.yaml. There are no other gateways."""

from __future__ import annotations

from collections.abc import AsyncIterator

from gpumesh.coordination.base import Loads
from gpumesh.state import Finding


class SingleGateway:
    def __repr__(self) -> str:
        return "<SingleGateway>"

    def other_gateways_load(self, key: str) -> int:  # noqa: ARG002
        return 0

    def findings(self) -> tuple[Finding, ...]:
        return ()

    async def run(self, own_loads: AsyncIterator[Loads]) -> None:
        """Returns at once and reads no loads: no other gateway would get them."""
