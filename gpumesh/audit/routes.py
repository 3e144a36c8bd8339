"""The ways to a node's server: which of them lead there, whether all lead to the same one, and which is faster.

Only after the routes were asked one by one, which `audit` does; until then there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.quoting import yaml_text
from gpumesh.state import BackendPhase, Finding, NodeState, RouteState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

# A way is worth a word when it takes this share of the time of the one in use or less, and is faster by this much.
FASTER = 0.7
LEAST_MS = 2.0


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    if state.tunnel.state is not TunnelPhase.UP or state.backend.state is not BackendPhase.UP:
        return
    node = spec.name
    used = route_in_use(state)
    ours = [route for route in state.routes if not route.offered]
    dead = [route for route in ours if route.state is BackendPhase.DOWN]
    if dead and used is not None:
        why = "; ".join(route.error or f"{route.target} does not serve" for route in dead)
        yield Finding(
            "route-dead",
            Severity.INFO,
            node,
            f"{len(dead)} of its {len(ours)} candidates {'does' if len(dead) == 1 else 'do'} not serve: {why}",
            "nothing, if it is a spare; else delete it from `backend.urls`",
        )
    if used is None:
        return
    others = [route for route in ours if route.state is BackendPhase.UP and route is not used]
    strangers = [route for route in others if used.store and route.store and route.store != used.store]
    if strangers:
        yield Finding(
            "routes-differ",
            Severity.WARNING,
            node,
            f"{used.target} and {', '.join(route.target for route in strangers)} are different servers under one name",
            "make a node of each: as candidates of one node only the first that answers is ever used",
        )
    offered = [route for route in state.routes if route.offered and route.state is BackendPhase.UP]
    open_to_all = [route for route in offered if route.exposed]
    if open_to_all:
        yield Finding(
            "backend-exposed",
            Severity.WARNING,
            node,
            f"its server answers the whole internet at {open_to_all[0].target}, without SSH and without a key",
            "let it listen on 127.0.0.1 of its host (OLLAMA_HOST=127.0.0.1), or close the port in the firewall: "
            "the tunnel works all the same",
        )
    better = [route for route in (*others, *offered) if route not in strangers and _faster(route, used)]
    if better:
        best = min(better, key=lambda route: route.latency_ms or 0.0)
        put = (
            f"give the node `backend: {{url: {yaml_text(best.target)}}}` and no `ssh`, if the way between may be seen"
            " by others"
            if best.offered
            else f"put {best.target} first under `backend.urls`"
        )
        yield Finding(
            "route-slower",
            Severity.INFO,
            node,
            f"the way in use takes {used.latency_ms:.1f} ms, {best.target} ({best.via}) {best.latency_ms:.1f} ms",
            put,
        )


def route_in_use(state: NodeState) -> RouteState | None:
    return next((route for route in state.routes if route.url == state.backend.url and not route.offered), None)


def _faster(route: RouteState, used: RouteState) -> bool:
    if route.latency_ms is None or used.latency_ms is None:
        return False
    return route.latency_ms <= FASTER * used.latency_ms and used.latency_ms - route.latency_ms >= LEAST_MS
