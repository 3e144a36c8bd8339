"""``TunnelLink``: a node's tunnel, the state that it reported last, and the number of its connections so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec, Target
from gpumesh.tunnels.base import Tunnel


class TunnelLink:
    """Holds a node's tunnel and the state that the tunnel reported last.

    ``tunnel`` is ``None`` for a disabled node and before the mesh has started. ``reported`` is the state of the
    tunnel's last callback. ``connection_count`` grows with each new connection. ``away_since`` is the time of the
    node's clock at which the tunnel was lost last; ``None`` while the tunnel is up, and if the time is not known.
    ``commands`` runs the probes' commands over the last connection; ``None`` before the first one.
    """

    def __init__(self, spec: NodeSpec, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.tunnel: Tunnel | None = None
        self.reported = TunnelState(transport="direct" if spec.ssh is None else spec.ssh.transport.value)
        self.is_up = False
        self.connection_count = 0
        self.away_since: float | None = None  # when the tunnel was lost
        self.commands: HostCommands | None = None
        self._clock = clock
        self._targets = spec.backend.targets
        self._up = asyncio.Event()
        self._down = asyncio.Event()  # set while the tunnel is not up
        self._down.set()

    def __repr__(self) -> str:
        return f"<TunnelLink {self.reported.transport} {self.reported.state.value} connection {self.connection_count}>"

    def update(self, state: TunnelState) -> None:
        """Stores the state that the tunnel reports."""
        was_up = self.is_up
        self.reported = state
        self.is_up = state.state is TunnelPhase.UP
        if not self.is_up:
            self._up.clear()
            self._down.set()
        elif not was_up:
            self.connection_count += 1
            if self.tunnel is not None:  # the new connection may lead to another host
                self.commands = HostCommands(self.tunnel, clock=self._clock)
            self._down.clear()
            self._up.set()

    async def wait_up(self) -> Tunnel:
        """Returns the tunnel as soon as it is up."""
        await self._up.wait()
        assert self.tunnel is not None, "a state UP was reported, but the node has no tunnel"
        return self.tunnel

    async def wait_down(self) -> None:
        """Returns as soon as the connection is lost."""
        await self._down.wait()

    @property
    def state(self) -> TunnelState:
        """The tunnel's present state. It may be newer than ``reported``: the tunnel does not report each change of the
        round-trip time."""
        return self.reported if self.tunnel is None else self.tunnel.state

    @property
    def urls(self) -> Mapping[Target, str]:
        """The base URL on this machine for each target that the tunnel reaches, in the order of mesh.yaml."""
        if self.tunnel is None:
            return {}
        urls = self.tunnel.urls
        return {target: urls[target] for target in self._targets if target in urls}

    def suspect(self, reason: str) -> None:
        """Makes the tunnel check its connection at once."""
        if self.tunnel is not None:
            self.tunnel.suspect(reason)
