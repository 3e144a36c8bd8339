"""Spreads the periodic work of many nodes over time.

All nodes start when the mesh starts. A hundred nodes that work at the same moment would hold up the event loop for a
tenth of a second each time. So the length of a node's first interval depends on its name. Later intervals are equal, so
the nodes stay apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator


def stagger_intervals(name: str, interval_s: float) -> Iterator[float]:
    """Yields intervals in seconds, without end: first 0.5 to 1.5 times ``interval_s``, then always ``interval_s``."""
    share_of_name = zlib.crc32(name.encode()) / 2**32  # 0 to 1, and always the same for a name
    yield interval_s * (0.5 + share_of_name)
    while True:
        yield interval_s
