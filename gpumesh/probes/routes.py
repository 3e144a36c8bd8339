"""Probes each route to a node's server by itself: whether the route works, to which server it leads, and its latency.

Only inspections do this, because it costs too much for a probe every two seconds. Besides the candidates of mesh.yaml,
the host's own address is tried without SSH. If the server answers there, this is the fastest route, but also an open
port of which the owner may not know. Nothing secret is sent by this route: no key, and only requests that the server
answers to everybody.
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

from gpumesh.audit.identity import store_fingerprint
from gpumesh.backends.dialects import DIALECTS
from gpumesh.errors import ProbeError
from gpumesh.probes.bounded_get import get_bounded
from gpumesh.probes.server_inventory import TimedInventory, ask_server, build_request_options
from gpumesh.state import BackendPhase, NodeState, RouteState
from gpumesh.text.addresses import is_loopback
from gpumesh.text.printable import printable
from gpumesh.topology import BackendKind, NodeSpec, Target

ROUND_TRIPS = 7  # of one measurement of latency; the first is not counted
DIRECT = "direct"

Answer = TimedInventory | ProbeError


@dataclass(frozen=True, slots=True)
class BackendRoute:
    """One way from this machine to a server: the server's address ``target`` on its own host, and the ``url`` by which
    this machine reaches it. ``via`` is the kind of the tunnel, or ``DIRECT``. ``offered``: the route is not in
    mesh.yaml; the mesh only proposes it."""

    target: Target
    url: str
    via: str
    offered: bool = False


def list_backend_routes(spec: NodeSpec, state: NodeState) -> tuple[BackendRoute, ...]:
    """The routes to the candidates of mesh.yaml that have a URL now, then the offered routes.

    An offered route goes to the host's own address without SSH. There is one for each candidate on the host's loopback
    address, if mesh.yaml has the host's address and SSH needs no jump host to reach it."""
    route_states = {route.target: route for route in state.routes if not route.offered}
    routes: list[BackendRoute] = []
    for target in spec.backend.targets:
        route_state = route_states.get(target.url)
        if route_state is not None:
            routes.append(BackendRoute(target, route_state.url, route_state.via))
    ssh = spec.ssh
    if ssh is not None and ssh.host and not ssh.proxy_jump and ssh.address_from is None:
        for target in spec.backend.targets:
            if is_loopback(target.host):
                direct_target = replace(target, host=ssh.host)
                base_url = direct_target.url.rstrip("/")  # the path of each request is appended to it
                routes.append(BackendRoute(target, base_url, DIRECT, offered=True))
    return tuple(routes)


async def probe_routes(
    client: httpx.AsyncClient, spec: NodeSpec, state: NodeState, *, api_key: str | None, timeout_s: float
) -> tuple[RouteState, ...]:
    """The states of the routes to the candidates of mesh.yaml, and of the offered routes that lead to the server in
    use. ``timeout_s`` is for each server's answer; no latency is measured after this time either. Never raises because
    of what a server does. The client must have ``trust_env`` off: a proxy would be another route."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    prober = _RouteProber(client, spec.backend.kind, api_key, timeout_s)
    routes = list_backend_routes(spec, state)
    answers = await asyncio.gather(*(prober.ask(route) for route in routes))
    answer_in_use = next(
        (answer for route, answer in zip(routes, answers, strict=True) if _is_in_use(route, state)), None
    )
    states = []
    # One route after the other, so that the measurements do not disturb each other.
    for route, answer in zip(routes, answers, strict=True):
        if not route.offered or _is_same_server(answer, answer_in_use, route):
            states.append(await prober.describe(route, answer, deadline))
    return tuple(states)


@dataclass(frozen=True, slots=True)
class _RouteProber:
    """Probes the routes to one node's server."""

    client: httpx.AsyncClient
    kind: BackendKind
    api_key: str | None
    timeout_s: float

    def _key_for(self, route: BackendRoute) -> str | None:
        """The API key that is sent by this route; none by an offered route, which nobody has allowed yet."""
        return None if route.offered else self.api_key

    def _target_of(self, route: BackendRoute) -> Target | None:
        """The address for the Host header; ``None``: the Host header names the route's own URL. So a request by an
        offered route is a request that any stranger could send."""
        return None if route.offered else route.target

    async def ask(self, route: BackendRoute, kind: BackendKind | None = None) -> Answer:
        """Asks the server as a server of this kind, by default of the node's kind. Returns its inventory or the
        error."""
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
        """The route's state after its server gave this answer. The latency is measured until ``deadline`` at most, a
        time of the event loop."""
        # An offered route leads to another address than that of its target: its own URL.
        target = route.url if route.offered else route.target.url
        state = RouteState(target, route.url, route.via, offered=route.offered)
        if isinstance(answer, ProbeError):
            # Another kind of server than mesh.yaml names may answer there: the report says which.
            kind = await self._find_other_kind(route) if answer.finding_code == "wrong-server" else None
            error = printable(answer.message)
            state = replace(state, state=BackendPhase.DOWN, error=error, error_code=answer.finding_code, kind=kind)
        else:
            time_left_s = deadline - asyncio.get_running_loop().time()
            latency_ms = await self._measure_latency(route, answer.kind, time_left_s)
            state = replace(
                state,
                state=BackendPhase.UP,
                latency_ms=latency_ms or answer.latency_ms,  # the second is less exact: it may include a connect
                store=store_fingerprint(answer.inventory.catalog),
                kind=answer.kind.value,
            )
        if route.offered:
            state = replace(state, exposed=await _is_public(route.url))
        return state

    async def _measure_latency(self, route: BackendRoute, kind: BackendKind, timeout_s: float) -> float | None:
        """The median of up to ``ROUND_TRIPS`` round trips in ms; ``None`` if no answer came in time."""
        dialect = DIALECTS[kind]
        call = dialect.probe_calls()[dialect.latency_probe]
        headers, extensions = build_request_options(self._target_of(route), self._key_for(route))
        latencies_ms: list[float] = []
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                for _ in range(ROUND_TRIPS):
                    started = time.perf_counter()
                    await get_bounded(self.client, route.url + call.path, headers, extensions)
                    latencies_ms.append((time.perf_counter() - started) * 1000.0)
        except (TimeoutError, ProbeError):
            pass  # the round trips before it count
        # The first round trip may include the opening of a connection, so it counts only if it is the only one.
        return round(median(latencies_ms[1:] or latencies_ms), 3) if latencies_ms else None

    async def _find_other_kind(self, route: BackendRoute) -> str | None:
        """Asks the server which kind it is. ``None`` if it is of no kind that mesh.yaml could name."""
        answer = await self.ask(route, BackendKind.AUTO)
        return answer.kind.value if isinstance(answer, TimedInventory) else None


def _is_in_use(route: BackendRoute, state: NodeState) -> bool:
    """Whether the node's requests go by this route now."""
    return not route.offered and route.url == state.backend.url


def _is_same_server(answer: Answer, answer_in_use: Answer | None, route: BackendRoute) -> bool:
    """Whether the server that gave ``answer`` over an offered route is the server in use: the model stores of both have
    the same fingerprint.

    If neither store has a fingerprint, a server with the same models counts as the same server, because the route's
    host is the node's host. This does not hold for a loopback address: it is this machine's, not the host's.
    """
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
    """Whether the URL's host has an address that the whole internet can reach. False if its name has no address."""
    host = httpx.URL(url).host
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [socket_address[0] for *_, socket_address in entries]  # the IP address comes before the port
    return any(ip_address(address).is_global for address in addresses)
