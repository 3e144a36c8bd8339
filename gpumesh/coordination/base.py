"""``Coordination``: what a mesh knows of other gateways that use the same GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from gpumesh.state import Finding

Loads = Mapping[str, int]
"""Requests in flight by key. A key names GPUs, and is the same for every gateway that reaches them
(``gpumesh.mesh.nodes.snapshot.coordination_key``)."""


class Coordination(Protocol):
    def other_gateways_load(self, key: str) -> int:
        """What all other gateways together have in flight there, as far as is known."""

    def findings(self) -> tuple[Finding, ...]:
        """What keeps this gateway from knowing the others; empty when all is as it should be."""

    async def run(self, own_loads: AsyncIterator[Loads]) -> None:
        """Publishes this gateway's loads whenever ``own_loads`` yields them, and receives the loads of the others.

        Ends when it is cancelled, or at once where there are no other gateways. Never raises on another's account."""
