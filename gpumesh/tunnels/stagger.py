"""Spreads the periodic work of many nodes over time.

All nodes start when the mesh starts. A hundred nodes that work at the same moment would hold up the event loop for a
tenth of a second each time. So the length of a node's first interval depends on its name. Later intervals are equal, so
the nodes stay apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator


def stagger_intervals(name: str, every_s: float) -> Iterator[float]:
    """An endless series of intervals: the first is 0.5 to 1.5 times ``every_s``, all others are ``every_s``."""
    yield every_s * (0.5 + zlib.crc32(name.encode()) / 2**32)
    while True:
        yield every_s
