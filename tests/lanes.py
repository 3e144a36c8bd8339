"""Tests run in several processes side by side (``make test``): nearly all of them wait more than they work. Those that
take the machine's cores for themselves, or change its network under others, are marked ``exclusive``: they wait until
no other test runs, and no other begins before they end.

Two locks on files: who runs holds the room, shared or alone; who wants in passes the door, one after the other, so that
a test that waits to be alone is not overtaken for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold_lane(folder: Path, *, alone: bool) -> Iterator[None]:
    """Open for as long as a test runs, of all processes that name the same ``folder``. Waits without an end: each
    process holds it for one test at a time, which has a time-out, and the kernel lets go for one that dies."""
    import fcntl  # not on every system; who runs one test at a time does not need it

    with (folder / "door").open("ab") as door, (folder / "room").open("ab") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
