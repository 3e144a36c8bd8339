"""No other gateways: the usual case."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping


class SingleGateway:
    problem: str | None = None

    def publish_loads(self, loads: Mapping[str, int]) -> None:
        pass

    def other_gateways_load(self, key: str) -> int:  # noqa: ARG002
        return 0

    async def run(self) -> None:
        await asyncio.Event().wait()
