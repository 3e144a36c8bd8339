"""Every way to a node's server asked by itself: whether it leads there, to which server, and how long it takes.

For `audit`: it costs more than a mesh would pay every two seconds. Besides the candidates of mesh.yaml the host's own
address is tried without SSH: that would be the fastest way, or a door that its owner does not know to be open. Nothing
secret goes that way: no key, and nothing is asked but what the server tells everybody.
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


@dataclass(frozen=True, slots=True)
class BackendRoute:
    """``target`` is the server as its own host knows it, ``url`` where it is asked from here."""

    target: Target
    url: str
    via: str
    offered: bool = False


def list_backend_routes(spec: NodeSpec, state: NodeState) -> tuple[BackendRoute, ...]:
    """The candidates of mesh.yaml that have a URL now, then the host's own address without SSH, where that is known to
    be reached without a jump and to be the one in mesh.yaml."""
    urls = {route.target: route for route in state.routes if not route.offered}
    found = [
        BackendRoute(target, urls[target.url].url, urls[target.url].via)
        for target in spec.backend.targets
        if target.url in urls
    ]
    ssh = spec.ssh
    if ssh is not None and ssh.host and not ssh.proxy_jump and ssh.address_from is None:
        for target in spec.backend.targets:
            if is_loopback(target.host):
                there = replace(target, host=ssh.host)
                found.append(BackendRoute(target, there.url.rstrip("/"), DIRECT, offered=True))
    return tuple(found)


async def probe_routes(
    client: httpx.AsyncClient, spec: NodeSpec, state: NodeState, *, api_key: str | None, timeout_s: float
) -> tuple[RouteState, ...]:
    """Never raises on a server's account. Of the ways that are not in mesh.yaml only those are told that lead to the
    server in use. The client must have ``trust_env`` off."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    all_ways = list_backend_routes(spec, state)
    answers = await asyncio.gather(
        *(_ask(client, spec.backend.kind, way, None if way.offered else api_key, timeout_s) for way in all_ways)
    )
    used = next((answer for way, answer in zip(all_ways, answers, strict=True) if _in_use(way, state)), None)
    found: list[RouteState] = []
    # One after the other, so that the ways do not measure each other.
    for way, answer in zip(all_ways, answers, strict=True):
        if way.offered and not _same(answer, used, way):
            continue
        key = None if way.offered else api_key
        latency_ms = None
        if isinstance(answer, TimedInventory):
            left_s = deadline - asyncio.get_running_loop().time()
            latency_ms = await _latency(client, spec.backend.kind, way, key, left_s) or answer.latency_ms
        route = _route(way, spec.backend.kind, answer, latency_ms)
        if isinstance(answer, ProbeError) and answer.finding_code == "wrong-server":
            route = replace(route, kind=await _other_kind(client, spec.backend.kind, way, key, timeout_s))
        if way.offered:
            route = replace(route, exposed=await _is_public(way.url))
        found.append(route)
    return tuple(found)


async def _ask(
    client: httpx.AsyncClient, kind: BackendKind, way: BackendRoute, api_key: str | None, timeout_s: float
) -> TimedInventory | ProbeError:
    # Without a tunnel the server is asked by the name by which anybody would ask it.
    target = None if way.offered else way.target
    try:
        return await ask_server(client, kind, way.url, target, api_key=api_key, timeout_s=timeout_s)
    except ProbeError as error:
        return error


async def _latency(
    client: httpx.AsyncClient, kind: BackendKind, way: BackendRoute, api_key: str | None, timeout_s: float
) -> float | None:
    """The middle one of some round trips on a warm connection, in ms; ``None`` when none came back in time."""
    dialect = DIALECTS[kind]
    call = dialect.probe_calls()[dialect.latency_probe]
    headers, names = build_request_options(None if way.offered else way.target, api_key)
    took: list[float] = []
    try:
        async with asyncio.timeout(max(timeout_s, 0.0)):
            for _ in range(ROUNDS):
                began = time.perf_counter()
                await get_bounded(client, way.url + call.path, headers, names)
                took.append((time.perf_counter() - began) * 1000.0)
    except (TimeoutError, ProbeError):
        pass  # what was measured until then is what is known
    return round(median(took[1:] or took), 3) if took else None


async def _other_kind(
    client: httpx.AsyncClient, kind: BackendKind, way: BackendRoute, api_key: str | None, timeout_s: float
) -> str | None:
    """What the server turns out to be, if it is of a kind that mesh.yaml could name."""
    for other in BackendKind:
        if other is not kind and isinstance(await _ask(client, other, way, api_key, timeout_s), TimedInventory):
            return other.value
    return None


def _route(
    way: BackendRoute, kind: BackendKind, answer: TimedInventory | ProbeError, latency_ms: float | None
) -> RouteState:
    # An offered way is another place than the target: it is told by its own URL.
    route = RouteState(way.url if way.offered else way.target.url, way.url, way.via, offered=way.offered)
    if isinstance(answer, ProbeError):
        return replace(route, state=BackendPhase.DOWN, error=printable(answer.message), error_code=answer.finding_code)
    return replace(
        route,
        state=BackendPhase.UP,
        latency_ms=latency_ms,
        store=store_fingerprint(answer.inventory.catalog),
        kind=kind.value,
    )


def _in_use(way: BackendRoute, state: NodeState) -> bool:
    return not way.offered and way.url == state.backend.url


def _same(answer: TimedInventory | ProbeError, used: TimedInventory | ProbeError | None, way: BackendRoute) -> bool:
    """Whether an offered way leads to the server in use. Where the store cannot tell, the host's address and the same
    models do, unless that address is this machine's."""
    if not isinstance(answer, TimedInventory) or not isinstance(used, TimedInventory):
        return False
    mine, theirs = store_fingerprint(used.inventory.catalog), store_fingerprint(answer.inventory.catalog)
    if mine is not None or theirs is not None:
        return mine == theirs
    same_models = _names(answer) == _names(used)
    return same_models and not is_loopback(httpx.URL(way.url).host)


def _names(answer: TimedInventory) -> Sequence[str]:
    return sorted(model.name for model in answer.inventory.catalog)


async def _is_public(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(ip_address(entry[4][0]).is_global for entry in found)
