"""``Coordination``: the interface through which a mesh learns the load of other gateways that use the same GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from gpumesh.state import Finding

Loads = Mapping[str, int]
"""Requests in flight by key. A key names GPUs, and every gateway that reaches these GPUs has the same key for them
(``gpumesh.mesh.nodes.snapshot.coordination_key``)."""


class Coordination(Protocol):
    """Exchanges loads with other gateways while ``run`` runs."""

    def other_gateways_load(self, key: str) -> int:
        """Returns the number of requests that all other gateways together have in flight on the GPUs of ``key``, as far
        as this gateway knows."""

    def findings(self) -> tuple[Finding, ...]:
        """Returns the reasons why this gateway does not know the load of the others; empty when it knows the load."""

    async def run(self, own_loads: AsyncIterator[Loads]) -> None:
        """Publishes this gateway's loads whenever ``own_loads`` yields them, and receives the loads of the others.

        Ends when it is cancelled, or at once where there are no other gateways. Raises no error that another gateway or
        Redis causes.
        """
