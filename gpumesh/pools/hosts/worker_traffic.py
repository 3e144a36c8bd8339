"""How many bytes a worker has received from the head: the progress of a load.

llama-server logs nothing between the start and the end of a load, which can take minutes. The kernel of the worker's
host counts the bytes of each connection; ``ss`` (iproute2) shows them.
"""

from __future__ import annotations

import re

from gpumesh.errors import ExecError
from gpumesh.pools.hosts.route import HostRoute

TIMEOUT_S = 5.0
_SCRIPT = 'ss -tin state established "( sport = :$1 )" 2>/dev/null'
_RECEIVED = re.compile(rb"\bbytes_received:([0-9]{1,18})\b")


async def read_received_bytes(route: HostRoute, port: int, *, timeout_s: float = TIMEOUT_S) -> int | None:
    """The bytes that the worker on ``port`` of the route's host has received over its present connection; ``None`` if
    nothing is connected, or the host does not tell (no ``ss``). Raises TunnelDown.

    Weights that the worker has in its cache are not sent, so they are not among these bytes.
    """
    try:
        result = await route.exec(("sh", "-c", _SCRIPT, "gpumesh-ss", str(port)), timeout_s=timeout_s)
    except ExecError:
        return None
    counts = [int(count) for count in _RECEIVED.findall(result.stdout)]
    return max(counts, default=None)
