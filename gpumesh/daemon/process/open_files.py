"""Raises the limit of open files (RLIMIT_NOFILE): each client and each forwarded connection is an open file.

The usual soft limit, 1,024, is meant for programs that use ``select``.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

# The soft limits to try. No limit is higher than the first, although a hard limit can be a thousand million: some
# children (an old ssh) close each possible descriptor one by one. The smaller limits are for macOS, which reports no
# hard limit and accepts no more than kern.maxfilesperproc.
LIMITS = (65_536, 24_576, 10_240, 4_096)


@contextlib.contextmanager
def raise_file_limit() -> Iterator[int]:
    """Raises the soft limit for the duration of the block, and yields the limit that is in force in the block.

    The limit also holds for child processes: the tunnels' processes and ``ssh`` hold a file for each forwarded
    connection.
    """
    previous_soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _raise_soft_limit(previous_soft, hard)
    try:
        yield limit
    finally:
        with contextlib.suppress(ValueError, OSError):  # if the hard limit was lowered meanwhile, the limits stay
            resource.setrlimit(resource.RLIMIT_NOFILE, (previous_soft, hard))


def _raise_soft_limit(soft: int, hard: int) -> int:
    """Sets the highest of ``candidate_limits`` that the system accepts, and returns it. If the system accepts none,
    returns ``soft``, the present limit."""
    for limit in candidate_limits(soft, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):  # macOS: the limit is above kern.maxfilesperproc
            continue
        return limit
    return soft


def candidate_limits(soft: int, hard: int) -> tuple[int, ...]:
    """Returns the soft limits that are worth trying, the highest first; none when ``soft`` is as high already. Pure.

    ``soft`` and ``hard`` are the present limits. No candidate is above ``hard``.
    """
    if soft == resource.RLIM_INFINITY:
        return ()
    limits: tuple[int, ...] = LIMITS
    if hard != resource.RLIM_INFINITY:
        limits = tuple(min(limit, hard) for limit in LIMITS)
    higher_limits = [limit for limit in limits if limit > soft]
    return tuple(dict.fromkeys(higher_limits))  # without duplicates
