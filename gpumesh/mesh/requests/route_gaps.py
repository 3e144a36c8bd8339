"""``RouteGaps``: which nodes lack which routes, of those that the gateway does not know, as their servers answered."""

from __future__ import annotations

from collections.abc import Callable, Collection

KNOWN_S = 60.0  # for so long the server is not asked again: it may be replaced by one that has the route
MAX_GAPS = 1024  # clients choose the paths


class RouteGaps:
    """The gaps of all nodes. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}  # by path and node

    def __repr__(self) -> str:
        return f"<RouteGaps {len(self._until)}>"

    def add(self, path: str, node: str) -> None:
        """Notes that the node's server lacks the route. ``path`` may hold a query, which does not matter."""
        key = (path.partition("?")[0], node)
        self._until.pop(key, None)  # a later entry is at the end again
        self._until[key] = self._clock() + KNOWN_S
        if len(self._until) > MAX_GAPS:
            del self._until[next(iter(self._until))]

    def forget(self, nodes: Collection[str]) -> None:
        """Forgets the gaps of these nodes."""
        self._until = {key: until for key, until in self._until.items() if key[1] not in nodes}

    def find_nodes(self, path: str) -> frozenset[str]:
        """The nodes whose servers have lately answered that they lack the route."""
        if not self._until:
            return frozenset()
        route, now = path.partition("?")[0], self._clock()
        return frozenset(node for (known, node), until in self._until.items() if known == route and now < until)
