"""What is done for each node every few seconds is not done for all of them at the same moment.

All begin together, when the mesh starts; a hundred that then keep step hold the event loop up for a tenth of a second
each time. So a node's second turn comes earlier or later, by its name, and all that follow keep that distance.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator


def stagger_intervals(name: str, every_s: float) -> Iterator[float]:
    """The waits between a node's turns, without end: the first 0.5 to 1.5 times ``every_s``, all others ``every_s``."""
    yield every_s * (0.5 + zlib.crc32(name.encode()) / 2**32)
    while True:
        yield every_s
