"""``FileFollower``: decides from repeated checks of a file when it is read, and when a bad file is reported. Pure.

An editor may write a file in several steps, or remove it and put another in its place. What it leaves in between may be
no YAML, or a mesh with fewer nodes. So a changed file is read when it has stayed the same for a while, and a file that
cannot be used is reported later still. Times are seconds of the caller's clock.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

CHECK_INTERVAL_S = 1.0  # between two checks of the file
# In intervals. Less than one: a file is read when two checks in a row have seen the same.
SETTLE_INTERVALS = 0.8
BAD_INTERVALS = 3.0  # for so long a file may be unusable before this is reported


class FileMarks(NamedTuple):
    """What changes with each write of a file. A file that is replaced has another inode."""

    modified_ns: int
    changed_ns: int
    size: int
    inode: int


def read_marks(path: Path) -> FileMarks | None:
    """The marks of the file, or of what a link leads to; ``None`` if there is nothing, or if it cannot be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileMarks(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


class FileFollower:
    """Follows one file. Its owner calls ``note_marks`` every ``interval_s`` seconds. The first content is read too: it
    may be newer than what the mesh has read."""

    def __init__(self, interval_s: float = CHECK_INTERVAL_S) -> None:
        self._settle_s = SETTLE_INTERVALS * interval_s
        self._bad_s = BAD_INTERVALS * interval_s
        self._marks: FileMarks | None = None
        self._changed_at: float | None = None  # when the marks were first seen
        self._is_due = False  # the file has changed since it was read last

    def __repr__(self) -> str:
        return f"<FileFollower {'waits for the file to settle' if self._is_due else 'same'}>"

    def note_marks(self, marks: FileMarks | None, now: float) -> bool:
        """Notes the marks that the file has now. Returns whether the file is to be read now."""
        if marks != self._marks:
            self._marks, self._changed_at, self._is_due = marks, now, True
        if self._is_due and self._changed_at is not None and now - self._changed_at >= self._settle_s:
            self._is_due = False
            return True
        return False

    def is_bad_file_due(self, now: float) -> bool:
        """Whether it is time to report that the file, as it was read last, cannot be used."""
        return self._changed_at is None or now - self._changed_at >= self._bad_s
