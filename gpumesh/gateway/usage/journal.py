"""``UsageJournal``: the file of the counts that the database does not have yet. A line survives a kill of the process.

Each line is a JSON document: the number of the journal, and rows of counts. When the database has all rows of a journal
(``store.py``), the file is emptied, and the next journal has the next number. The database knows the last number that
it has. So no row is counted twice, or lost, wherever the process is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from gpumesh.gateway.usage.counts import UsageCounts

MAX_JOURNAL_BYTES = 8 << 20  # more is not read: no journal of ours becomes so long


class UsageKey(NamedTuple):
    """What a row of counts is about. ``day`` is ``2026-11-30``, in UTC. ``key`` is the name of the key's holder; empty
    without a key."""

    day: str
    key: str
    model: str
    node: str


UsageRow = tuple[UsageKey, UsageCounts]


class _Line(msgspec.Struct, frozen=True, array_like=True):
    number: int
    rows: list[UsageRow]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


class UsageJournal:
    """The open file at ``path``, which is made if it is missing, for our own user only. ``number``: that of the rows
    that are written from now on. Raises OSError if the file cannot be opened."""

    def __init__(self, path: Path, number: int) -> None:
        self.number = number
        self.size = 0  # bytes
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, flags, 0o600)

    def append(self, rows: Iterable[UsageRow]) -> None:
        """Writes the rows, in one call: all of them or none. Raises OSError."""
        data = _encode(_Line(self.number, list(rows))) + b"\n"
        written = os.write(self._file, data)
        self.size += written
        if written < len(data):  # the disk is full: a reader ignores the piece
            raise OSError(28, "No space left on device")

    def clear(self, number: int) -> None:
        """Empties the file. ``number``: that of the next journal. Raises OSError."""
        self.number = number
        os.ftruncate(self._file, 0)
        self.size = 0

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> list[tuple[int, list[UsageRow]]]:
    """The lines of a journal, each as its number and its rows; none if there is no file. A line that cannot be read is
    left out: it was cut by a full disk. Raises OSError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JOURNAL_BYTES)
    except FileNotFoundError:
        return []
    lines = []
    for text in data.splitlines():
        try:
            line = _decode(text)
        except msgspec.MsgspecError:
            continue
        lines.append((line.number, line.rows))
    return lines
