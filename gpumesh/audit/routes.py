"""The audit's rules about routes to a node's server: dead, exposed or faster routes, and routes to different servers.

The rules yield no finding before the node's first inspection, which asks each route by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.state import BackendPhase, Finding, NodeState, RouteState, Severity, TunnelPhase
from gpumesh.text.quoting import yaml_text
from gpumesh.topology import NodeSpec

# A route counts as faster only if its latency is at most this share of the current route's, and also lower by at least
# this gain. A smaller difference may be chance.
MAX_LATENCY_SHARE = 0.7
MIN_GAIN_MS = 2.0


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields the findings about the routes of a node that is up.

    Candidates are the routes of mesh.yaml. Offered routes are not in mesh.yaml: an inspection has found them. No
    finding while the route in use is unknown, because the others are compared with this route.
    """
    if state.tunnel.state is not TunnelPhase.UP or state.backend.state is not BackendPhase.UP:
        return
    current = route_in_use(state)
    if current is None:
        return
    candidates = [route for route in state.routes if not route.offered]
    other_routes = [route for route in candidates if route.state is BackendPhase.UP and route is not current]
    to_other_servers = [route for route in other_routes if _leads_to_other_server(route, current)]
    offered_routes = [route for route in state.routes if route.offered and route.state is BackendPhase.UP]
    to_same_server = [route for route in (*other_routes, *offered_routes) if route not in to_other_servers]
    yield from _check_dead_routes(spec.name, candidates)
    yield from _check_other_servers(spec.name, current, to_other_servers)
    yield from _check_exposed_routes(spec.name, offered_routes)
    yield from _check_faster_routes(spec.name, current, to_same_server)


def _leads_to_other_server(route: RouteState, current: RouteState) -> bool:
    """Whether the two routes lead to servers with different model stores. An unknown store counts as the same."""
    both_known = bool(route.store and current.store)
    return both_known and route.store != current.store


def _check_dead_routes(node: str, candidates: Sequence[RouteState]) -> Iterator[Finding]:
    """Yields ``route-dead`` if some candidates do not serve."""
    dead_routes = [route for route in candidates if route.state is BackendPhase.DOWN]
    if dead_routes:
        reasons = "; ".join(route.error or f"{route.target} does not serve" for route in dead_routes)
        verb = "does" if len(dead_routes) == 1 else "do"
        yield Finding(
            "route-dead",
            Severity.INFO,
            node,
            f"{len(dead_routes)} of its {len(candidates)} candidates {verb} not serve: {reasons}",
            "nothing, if it is a spare; else delete it from `backend.urls`",
        )


def _check_other_servers(node: str, current: RouteState, to_other_servers: Sequence[RouteState]) -> Iterator[Finding]:
    """Yields ``routes-differ`` if some candidates lead to other servers than the current route."""
    if to_other_servers:
        targets = ", ".join(route.target for route in to_other_servers)
        yield Finding(
            "routes-differ",
            Severity.WARNING,
            node,
            f"{current.target} and {targets} are different servers under one name",
            "make a node of each: as candidates of one node only the first that answers is ever used",
        )


def _check_exposed_routes(node: str, offered_routes: Sequence[RouteState]) -> Iterator[Finding]:
    """Yields ``backend-exposed`` if the server answers on a public address. The message has the first such address."""
    exposed_routes = [route for route in offered_routes if route.exposed]
    if exposed_routes:
        yield Finding(
            "backend-exposed",
            Severity.WARNING,
            node,
            f"its server answers the whole internet at {exposed_routes[0].target}, without SSH and without a key",
            "let it listen on 127.0.0.1 of its host (OLLAMA_HOST=127.0.0.1), or close the port in the firewall: "
            "the tunnel works all the same",
        )


def _check_faster_routes(node: str, current: RouteState, to_same_server: Sequence[RouteState]) -> Iterator[Finding]:
    """Yields ``route-slower`` if another route to the same server is clearly faster than the current route.

    ``to_same_server``: the other routes that work and lead to the server of the current route.
    """
    faster_routes = [route for route in to_same_server if _is_faster(route, current)]
    if faster_routes:
        # ``or 0.0`` is only for mypy: ``_is_faster`` is true only for a known latency.
        fastest = min(faster_routes, key=lambda route: route.latency_ms or 0.0)
        if fastest.offered:  # the address is not in mesh.yaml, and the server answers there without SSH
            hint = (
                f"give the node `backend: {{url: {yaml_text(fastest.target)}}}` and no `ssh`, if the way between may be"
                " seen by others"
            )
        else:
            hint = f"put {fastest.target} first under `backend.urls`"
        yield Finding(
            "route-slower",
            Severity.INFO,
            node,
            f"the way in use takes {current.latency_ms:.1f} ms,"
            f" {fastest.target} ({fastest.via}) {fastest.latency_ms:.1f} ms",
            hint,
        )


def route_in_use(state: NodeState) -> RouteState | None:
    """Returns the candidate of mesh.yaml over which requests are sent now; ``None`` if there is none."""
    return next((route for route in state.routes if route.url == state.backend.url and not route.offered), None)


def _is_faster(route: RouteState, current: RouteState) -> bool:
    """Whether ``route`` is clearly faster than ``current``; false if a latency is unknown."""
    if route.latency_ms is None or current.latency_ms is None:
        return False
    share_is_small = route.latency_ms <= MAX_LATENCY_SHARE * current.latency_ms
    gain_is_large = current.latency_ms - route.latency_ms >= MIN_GAIN_MS
    return share_is_small and gain_is_large
