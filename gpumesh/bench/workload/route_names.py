"""The names of the routes to a node that the scenario ``overhead`` compares. Values only.

The shortest route is measured twice, under two names: the difference between the two (A-A) shows how large a difference
is that means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

DIRECT = "direct"  # to the node's server, without a tunnel
TUNNEL = "tunnel"  # through the local end of the node's tunnel
MESH = "mesh"  # through the mesh's own code, without HTTP
GATEWAY = "gateway"  # through the mesh's gateway, as clients go
_AGAIN = " again"
_ORDER = (DIRECT, TUNNEL, MESH, GATEWAY)  # the shortest first


def in_order(routes: Iterable[str | None]) -> list[str | None]:
    """Each of these routes once, the shortest first."""
    return sorted(set(routes), key=_rank)


def _rank(route: str | None) -> tuple[int, str]:
    """Where the route stands in the order. Any other name stands at the end."""
    name = without_again(route or "")
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), route or ""


def is_again(route: str) -> bool:
    """Whether the name is that of the second measurement of a route."""
    return route.endswith(_AGAIN)


def again(route: str) -> str:
    """The name for the second measurement of a route."""
    return route + _AGAIN


def without_again(route: str) -> str:
    """The route that is measured under this name."""
    return route.removesuffix(_AGAIN)
