"""``SingleGateway``: the coordination of a mesh without ``redis`` in mesh.yaml. There are no other gateways."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpumesh.balancer.base import Priority
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.exchange import Exchange, NoExchange
from gpumesh.state import Finding


class SingleGateway:
    def __init__(self) -> None:
        self.exchange: Exchange = NoExchange()

    def __repr__(self) -> str:
        return "<SingleGateway>"

    def take_now(self, key: str) -> bool | None:  # noqa: ARG002
        return True

    async def take(self, key: str, request: PlaceRequest) -> bool:  # noqa: ARG002
        return True

    def hold(self, key: str) -> None:
        pass

    def release(self, key: str, priority: Priority, client: str, cost_correction: float = 0.0) -> None:
        pass

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:  # noqa: ARG002
        return 0

    def announce(self, key: str, heads: Sequence[PlaceRequest]) -> None:
        pass

    def shared_keys(self) -> Collection[str]:
        return ()

    def findings(self) -> tuple[Finding, ...]:
        return ()

    async def run(self) -> None:
        """Returns at once: there is nobody to share places with."""
