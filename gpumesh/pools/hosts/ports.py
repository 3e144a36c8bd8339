"""Free ports on a host, for programs that listen on its loopback. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection

# Below the ports that Linux gives to connections (32768 and up), and above those that people choose.
FIRST_PORT = 20_000
LAST_PORT = 32_000


def choose_free_ports(used: Collection[int], count: int, rng: random.Random) -> tuple[int, ...]:
    """``count`` different ports that are not in ``used``, by chance: two meshes may look for ports at the same time.

    A port can be taken between the look and its use. Then the program says so, and another port is tried.
    """
    free_ports = [port for port in range(FIRST_PORT, LAST_PORT) if port not in used]
    return tuple(rng.sample(free_ports, count))
