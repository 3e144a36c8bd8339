"""The limits on what a client of the server can hold, and for how long."""

from __future__ import annotations

import resource
from dataclasses import dataclass

RESERVED_FILES = 256  # open files that are not for clients: tunnels, probes, the log, sockets of other commands


def compute_max_connections() -> int:
    """The largest number of clients' connections for which the process may have enough open files. Each of them counts
    twice, because a connection to a node may belong to it."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit == resource.RLIM_INFINITY:
        return 1 << 20  # more than any gateway can serve
    return max((soft_limit - RESERVED_FILES) // 2, 64)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits for the clients of one server, in seconds, bytes, and bytes/s.

    - A head must be complete within ``head_timeout_s``.
    - A body may take ``body_timeout_s``, and a second more for each ``min_bytes_per_s`` bytes of it.
    - After a refusal the connection is still read for ``linger_s``, so that the client sees the refusal and no reset.
    - A client is cut off if it takes less than ``min_bytes_per_s`` of its answer, averaged over ``write_timeout_s``.
    - A stream is cut off if its client takes nothing for ``stall_timeout_s`` while other requests wait for the slot
      that the stream holds.
    """

    head_timeout_s: float = 30.0
    max_head_bytes: int = 32 << 10
    body_timeout_s: float = 30.0
    min_bytes_per_s: int = 4 << 10
    max_body_bytes: int = 256 << 20  # so large because images come inside of JSON
    max_unpacked_bytes: int = 20 << 20  # of a compressed body: as much as Ollama itself takes (server/cloud_proxy.go)
    total_body_bytes: int = 512 << 20  # of all requests together (body_memory.py)
    linger_s: float = 2.0
    write_timeout_s: float = 60.0
    stall_timeout_s: float = 5.0
    # Longer than clients keep an idle connection (90 s in Go). So the client is the one that closes the connection, and
    # never sends a request on a connection that the server is closing.
    keepalive_s: float = 120.0
    max_connections: int | None = None  # None: compute_max_connections()
