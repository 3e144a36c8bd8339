"""Opens the routes to one node that the scenario ``overhead`` compares, by their names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from gpumesh.bench.load.routes import ApiKeys, http_route
from gpumesh.bench.load.send_prompt import SendPrompt
from gpumesh.bench.workload.route_names import DIRECT, GATEWAY, MESH, TUNNEL, control_of, measured_route
from gpumesh.state import MeshState, NodeState
from gpumesh.topology import BackendKind


@dataclass(frozen=True, slots=True)
class RouteAccess:
    """What is needed to reach servers outside the mesh: the API keys, and for some nodes the URL (by the node's name)
    at which their server is reached without their tunnel."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    direct_urls: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def routes_to(node: NodeState, *, has_gateway: bool, access: RouteAccess) -> tuple[str, ...]:
    """The names of the routes to a node, the shortest first. The shortest is measured twice: the second
    name is its control's."""
    has_tunnel = node.tunnel.transport != "direct"
    server_routes = []  # those that lead directly to the server
    if not has_tunnel or node.name in access.direct_urls:
        server_routes.append(DIRECT)
    if has_tunnel:
        server_routes.append(TUNNEL)
    shortest, *longer = server_routes
    return (shortest, control_of(shortest), *longer, MESH, *((GATEWAY,) if has_gateway else ()))


@asynccontextmanager
async def open_routes(
    node: NodeState, state: MeshState, send: SendPrompt, access: RouteAccess
) -> AsyncGenerator[Mapping[str, SendPrompt]]:
    """Opens the routes to the node, by their names. ``send`` sends through the mesh."""
    routes: dict[str, SendPrompt] = {}
    kind = BackendKind(node.backend.kind)
    async with AsyncExitStack() as stack:
        for name in routes_to(node, has_gateway=state.gateway.url is not None, access=access):
            if name == MESH:
                routes[name] = send
                continue
            if name == GATEWAY:
                assert state.gateway.url is not None, "the gateway serves"
                route = http_route(state.gateway.url, kind, through_gateway=True, api_key=access.keys.gateway)
            else:
                url = node.backend.url
                if measured_route(name) == DIRECT:
                    url = access.direct_urls.get(node.name, url)
                assert url is not None, "a node that is up has no URL"
                route = http_route(url, kind, api_key=access.keys.nodes.get(node.name))
            routes[name] = await stack.enter_async_context(route)
        yield routes
