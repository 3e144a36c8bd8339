"""How much of anything a client of the server can hold, and for how long."""

from __future__ import annotations

import resource
from dataclasses import dataclass

RESERVED_FILES = 256  # of the process's open files: tunnels, probes, log, sockets of other commands


def compute_max_connections() -> int:
    """As many as the process may have open files for, when each client's connection needs a second one to a node."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 20
    return max((soft - RESERVED_FILES) // 2, 64)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, bytes, and bytes/s. A body may take ``body_timeout_s``, and a second more for each ``min_bytes_per_s``
    bytes of it. A refused body is still read for ``linger_s``, so that its client sees the refusal and not a reset. A
    client that takes less than ``min_bytes_per_s`` of its answer for ``write_timeout_s`` is cut off, and so is the
    stream of one that takes nothing for ``stall_timeout_s`` while others wait for what the stream holds."""

    head_timeout_s: float = 30.0
    max_head_bytes: int = 32 << 10
    body_timeout_s: float = 30.0
    min_bytes_per_s: int = 4 << 10
    max_body_bytes: int = 256 << 20  # images come inside of JSON
    max_unpacked_bytes: int = 20 << 20  # of a compressed body: what Ollama itself takes (server/cloud_proxy.go)
    total_body_bytes: int = 512 << 20  # of all requests together (body_memory.py)
    linger_s: float = 2.0
    write_timeout_s: float = 60.0
    stall_timeout_s: float = 5.0
    keepalive_s: float = 120.0  # longer than the clients' own (90 s in Go): the clients close first, and nothing races
    max_connections: int | None = None  # None: compute_max_connections()
