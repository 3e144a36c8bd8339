"""A server that belongs to no mesh, in the place of a mesh: `bench run --url` measures it with the same yardstick."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from urllib.parse import urlsplit

from gpumesh.bench.load.http.client_apis import ClientApi
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.workload.settings import Scenario
from gpumesh.errors import UsageError
from gpumesh.mesh.outages.outage import Outage
from gpumesh.state import (
    BackendPhase,
    BackendState,
    GatewayState,
    Health,
    MeshState,
    NodeState,
    TunnelPhase,
    TunnelState,
    compute_totals,
)

SCENARIOS = (Scenario.QUICK, Scenario.SWEEP, Scenario.REPLAY, Scenario.LOAD)
"""The scenarios that make sense for one server."""


class UrlTarget:
    """Implements ``stage_runner.BenchTarget`` for one server. Its only node has the server's address as its name.

    Raises UsageError for a URL without ``http`` or ``https`` and a host, and for one that holds a password.
    """

    embedded = False

    def __init__(self, url: str, api: ClientApi) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
            has_password = parts.password is not None
            _ = parts.port  # raises ValueError for a port that is none
        except ValueError:
            valid = has_password = False
        if not valid:
            raise UsageError(f"--url {url!r} is no URL of a server", hint="e.g. --url http://127.0.0.1:8000")
        if has_password:
            raise UsageError(
                "--url must not hold a password", hint="put the key into a variable, and add --key-env NAME"
            )
        self.name = parts.netloc
        self.url = url.rstrip("/").removesuffix("/v1")  # the path of each API begins with its version
        backend = BackendState(api.value, BackendPhase.UP, url=self.url)
        tunnel = TunnelState("none", TunnelPhase.UP)
        self._nodes = (NodeState(self.name, Health.HEALTHY, None, tunnel, backend),)

    def __repr__(self) -> str:
        return f"<UrlTarget {self.url}>"

    def send(self) -> SendPrompt:
        """There is no mesh to send through: the load generator sends to the URL."""
        raise UsageError("a URL is measured by the load generator's own process only")

    async def status(self) -> MeshState:
        """A state with the server as the only node. Its load and its GPUs are unknown."""
        return MeshState(self.name, datetime.now(UTC), GatewayState(), compute_totals(self._nodes), self._nodes)

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:  # noqa: ARG002
        """Yields the state once: it never changes."""
        yield await self.status()

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        raise UsageError(f"{node} belongs to no mesh and cannot be taken out of service")
