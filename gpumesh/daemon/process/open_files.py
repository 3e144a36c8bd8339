"""How many files the mesh's process may have open: as many as the system lets it, since each client and each forwarded
connection is one. The usual soft limit, 1,024, is for programs that use ``select``."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

# Not all that a hard limit may allow: it can be a thousand million, and children (an old ssh, say) close each
# descriptor that they could have, one by one. The others: macOS tells no hard limit, and takes no more than
# kern.maxfilesperproc.
WANTED = (65_536, 24_576, 10_240, 4_096)


@contextlib.contextmanager
def raise_file_limit() -> Iterator[int]:
    """Raises the soft limit, for this process and for what it starts: the tunnels' processes and ``ssh`` hold a file
    for each forwarded connection. Put back at the end. Gives the limit that holds."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = _raise(before, hard)
    try:
        yield raised
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def _raise(before: int, hard: int) -> int:
    for wanted in candidate_limits(before, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            continue
        return wanted
    return before


def candidate_limits(soft: int, hard: int) -> tuple[int, ...]:
    """Soft limits that are worth a try, the best first; none where the present one is as good. Pure."""
    if soft == resource.RLIM_INFINITY:
        return ()
    bounded = (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard) for wanted in WANTED)
    return tuple(dict.fromkeys(wanted for wanted in bounded if wanted > soft))
