"""``TunnelWatch``: notices that a tunnel of a pool was lost. A pool does not wait for it to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpumesh.errors import PoolFailed, tunnel_error_from_code
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.tunnels.base import ClosableTunnel
from gpumesh.tunnels.supervisor import run_tunnel

CONNECT_TIMEOUT_S = 15.0


class TunnelWatch:
    """Takes the states of one tunnel (``on_change`` of ``open_tunnel``)."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._was_up = False
        self._lost: asyncio.Future[TunnelState] = asyncio.get_running_loop().create_future()

    def __call__(self, state: TunnelState) -> None:
        if state.state is TunnelPhase.UP:
            self._was_up = True
        elif self._was_up and not self._lost.done():
            self._lost.set_result(state)

    async def wait_lost(self) -> PoolFailed:
        """Waits until the tunnel that was up is lost, and returns that as an error."""
        state = await asyncio.shield(self._lost)
        reason = f": {state.last_error}" if state.last_error else ""
        return PoolFailed(f"the tunnel to {self._node} was lost{reason}", hint=state.hint, node=self._node)


@asynccontextmanager
async def tunnel_up(tunnel: ClosableTunnel, node: str) -> AsyncIterator[None]:
    """Runs the tunnel during the block, which begins when it is up. Raises TunnelError."""
    async with run_tunnel(tunnel):
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await tunnel.wait_up()
        except TimeoutError:
            state = tunnel.state
            message = state.last_error or f"the tunnel to {node} did not come up within {CONNECT_TIMEOUT_S:g} s"
            raise tunnel_error_from_code(state.error_code or "", message, hint=state.hint, node=node) from None
        yield
