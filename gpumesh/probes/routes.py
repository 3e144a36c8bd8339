"""Each route to a node's server asked by itself: whether it leads there, to which server, and how long it takes.

For inspections: it costs more than a probe every two seconds may. Besides the candidates of mesh.yaml the host's own
address is tried without SSH. It would be the fastest route, or a door that its owner does not know to be open. Nothing
secret is sent that way: no key, and only requests that the server answers to everybody.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from statistics import median

import httpx

from gpumesh.addresses import is_loopback
from gpumesh.audit.identity import store_fingerprint
from gpumesh.backends.dialects import DIALECTS
from gpumesh.errors import ProbeError
from gpumesh.printable import printable
from gpumesh.probes.bounded_get import get_bounded
from gpumesh.probes.server_inventory import TimedInventory, ask_server, build_request_options
from gpumesh.state import BackendPhase, NodeState, RouteState
from gpumesh.topology import BackendKind, NodeSpec, Target

ROUNDS = 7
DIRECT = "direct"

Answer = TimedInventory | ProbeError


@dataclass(frozen=True, slots=True)
class BackendRoute:
    """``target`` is the server as its own host knows it, ``url`` where it is asked from here. ``offered``: the route is
    not in mesh.yaml."""

    target: Target
    url: str
    via: str
    offered: bool = False


def list_backend_routes(spec: NodeSpec, state: NodeState) -> tuple[BackendRoute, ...]:
    """The candidates of mesh.yaml that have a URL now, then the host's own address without SSH, where mesh.yaml names
    that address and no jump host is between."""
    urls = {route.target: route for route in state.routes if not route.offered}
    routes = [
        BackendRoute(target, urls[target.url].url, urls[target.url].via)
        for target in spec.backend.targets
        if target.url in urls
    ]
    ssh = spec.ssh
    if ssh is not None and ssh.host and not ssh.proxy_jump and ssh.address_from is None:
        for target in spec.backend.targets:
            if is_loopback(target.host):
                direct_target = replace(target, host=ssh.host)
                routes.append(BackendRoute(target, direct_target.url.rstrip("/"), DIRECT, offered=True))
    return tuple(routes)


async def probe_routes(
    client: httpx.AsyncClient, spec: NodeSpec, state: NodeState, *, api_key: str | None, timeout_s: float
) -> tuple[RouteState, ...]:
    """Never raises on a server's account. Of the routes that are not in mesh.yaml it returns those that lead to the
    server in use. The client must have ``trust_env`` off."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    prober = _RouteProber(client, spec.backend.kind, api_key, timeout_s)
    routes = list_backend_routes(spec, state)
    answers = await asyncio.gather(*(prober.ask(route) for route in routes))
    answer_in_use = next(
        (answer for route, answer in zip(routes, answers, strict=True) if _is_in_use(route, state)), None
    )
    states = []
    # One after the other, so that the measurements do not disturb each other.
    for route, answer in zip(routes, answers, strict=True):
        if not route.offered or _is_same_server(answer, answer_in_use, route):
            states.append(await prober.describe(route, answer, deadline))
    return tuple(states)


@dataclass(frozen=True, slots=True)
class _RouteProber:
    """The probes of one node's routes."""

    client: httpx.AsyncClient
    kind: BackendKind
    api_key: str | None
    timeout_s: float

    def _key_for(self, route: BackendRoute) -> str | None:
        return None if route.offered else self.api_key

    def _target_of(self, route: BackendRoute) -> Target | None:
        """Without a tunnel the server is asked by the name by which anybody would ask it."""
        return None if route.offered else route.target

    async def ask(self, route: BackendRoute, kind: BackendKind | None = None) -> Answer:
        """What the server says as one of this kind, by default of the node's kind."""
        try:
            return await ask_server(
                self.client,
                kind or self.kind,
                route.url,
                self._target_of(route),
                api_key=self._key_for(route),
                timeout_s=self.timeout_s,
            )
        except ProbeError as error:
            return error

    async def describe(self, route: BackendRoute, answer: Answer, deadline: float) -> RouteState:
        """The route's state; its latency is measured until ``deadline`` at most."""
        # An offered route leads to another address than the target, so its own URL stands for it.
        state = RouteState(
            route.url if route.offered else route.target.url, route.url, route.via, offered=route.offered
        )
        if isinstance(answer, ProbeError):
            kind = await self._find_other_kind(route) if answer.finding_code == "wrong-server" else None
            error = printable(answer.message)
            state = replace(state, state=BackendPhase.DOWN, error=error, error_code=answer.finding_code, kind=kind)
        else:
            left_s = deadline - asyncio.get_running_loop().time()
            state = replace(
                state,
                state=BackendPhase.UP,
                latency_ms=await self._measure_latency(route, answer.kind, left_s) or answer.latency_ms,
                store=store_fingerprint(answer.inventory.catalog),
                kind=answer.kind.value,
            )
        return replace(state, exposed=await _is_public(route.url)) if route.offered else state

    async def _measure_latency(self, route: BackendRoute, kind: BackendKind, timeout_s: float) -> float | None:
        """The median of some round trips on a warm connection, in ms; ``None`` when none came back in time."""
        dialect = DIALECTS[kind]
        call = dialect.probe_calls()[dialect.latency_probe]
        headers, extensions = build_request_options(self._target_of(route), self._key_for(route))
        latencies_ms: list[float] = []
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                for _ in range(ROUNDS):
                    started = time.perf_counter()
                    await get_bounded(self.client, route.url + call.path, headers, extensions)
                    latencies_ms.append((time.perf_counter() - started) * 1000.0)
        except (TimeoutError, ProbeError):
            pass  # what was measured until then counts
        # The first round trip may include making the connection.
        return round(median(latencies_ms[1:] or latencies_ms), 3) if latencies_ms else None

    async def _find_other_kind(self, route: BackendRoute) -> str | None:
        """The kind of the server, if it is another one that mesh.yaml could name."""
        answer = await self.ask(route, BackendKind.AUTO)
        return answer.kind.value if isinstance(answer, TimedInventory) else None


def _is_in_use(route: BackendRoute, state: NodeState) -> bool:
    return not route.offered and route.url == state.backend.url


def _is_same_server(answer: Answer, answer_in_use: Answer | None, route: BackendRoute) -> bool:
    """Whether an offered route leads to the server in use. Where the store cannot tell, the host's address and the same
    models do, unless that address is this machine's."""
    if not isinstance(answer, TimedInventory) or not isinstance(answer_in_use, TimedInventory):
        return False
    store = store_fingerprint(answer.inventory.catalog)
    store_in_use = store_fingerprint(answer_in_use.inventory.catalog)
    if store is not None or store_in_use is not None:
        return store == store_in_use
    same_models = _model_names(answer) == _model_names(answer_in_use)
    return same_models and not is_loopback(httpx.URL(route.url).host)


def _model_names(answer: TimedInventory) -> Sequence[str]:
    return sorted(model.name for model in answer.inventory.catalog)


async def _is_public(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(ip_address(entry[4][0]).is_global for entry in addresses)
