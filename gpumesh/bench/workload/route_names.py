"""The names of the routes to a node that the scenario ``overhead`` compares. Values only.

The shortest route is measured twice, under two names. The second measurement is the control: its difference from the
first (the A-A difference) shows how large a difference is that means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

DIRECT = "direct"  # to the node's server, without a tunnel
TUNNEL = "tunnel"  # through the local end of the node's tunnel
MESH = "mesh"  # through the mesh's own code, without HTTP
GATEWAY = "gateway"  # through the mesh's gateway, as clients go
_AGAIN = " again"  # the end of a control's name
_ORDER = (DIRECT, TUNNEL, MESH, GATEWAY)  # the shortest first


def in_order(routes: Iterable[str | None]) -> list[str | None]:
    """Each of these routes once, the shortest first."""
    return sorted(set(routes), key=_rank)


def _rank(route: str | None) -> tuple[int, str]:
    """Where the route stands in the order. Any other name stands at the end."""
    name = measured_route(route or "")
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), route or ""


def is_control(route: str) -> bool:
    """Whether this is the control: the second measurement of a route, under a name of its own."""
    return route.endswith(_AGAIN)


def control_of(route: str) -> str:
    """The name of the control of a route."""
    return route + _AGAIN


def measured_route(route: str) -> str:
    """The route that is measured under this name: that of the control, or the name itself."""
    return route.removesuffix(_AGAIN)
