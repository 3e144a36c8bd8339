"""``UsageStore``: the counts of all requests in a SQLite file of the state folder, one row for each day, key, model and
node.

A commit is not synchronised with the disk (WAL, ``synchronous=NORMAL``): it survives a kill of the process, and a loss
of power may cost the last seconds. So it takes some 50 us, and the event loop may wait for it. The file of the commits
(WAL) is folded into the database by ``checkpoint``, which waits for the disk and runs in a thread.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec

from gpumesh.gateway.usage.counts import UsageCounts

log = logging.getLogger(__name__)

FORMAT = 1
KEPT_DAYS = 400  # older days are removed at the start: a year can be compared with the one before
READ_TIMEOUT_S = 2.0  # a reader may have to wait while the file is recovered after a kill
DAMAGED_SUFFIX = ".damaged"

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, node TEXT NOT NULL,
    requests INTEGER NOT NULL, failed INTEGER NOT NULL, cancelled INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL,
    gpu_s REAL NOT NULL, energy_j REAL NOT NULL,
    PRIMARY KEY (day, key, model, node)
) WITHOUT ROWID
"""
COUNTS = UsageCounts.__struct_fields__  # the columns of the table after those of UsageKey, in the same order
_ADD = (
    f"INSERT INTO usage VALUES ({', '.join('?' * (4 + len(COUNTS)))}) ON CONFLICT DO UPDATE SET "  # noqa: S608
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
)


class UsageKey(NamedTuple):
    """What a row of counts is about. ``day`` is ``2026-11-30``, in UTC. ``key`` is the name of the key's holder; empty
    without a key."""

    day: str
    key: str
    model: str
    node: str


def open_store(path: Path) -> UsageStore | None:
    """Opens the store; ``None`` if that is not possible, with the reason in the log: the gateway works without it."""
    try:
        return UsageStore(path)
    except (sqlite3.Error, OSError) as error:
        log.warning("usage is not kept, %s cannot be used: %s", path, error, extra={"event": "usage"})
        return None


class UsageStore:
    """The open file at ``path``. Only one process writes it: the one that has the mesh's lock.

    Raises sqlite3.Error or OSError if the file cannot be opened. A damaged file is put aside, and a new one begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            aside = path.with_name(path.name + DAMAGED_SUFFIX)
            log.warning("%s is damaged (%s): it is now %s, and usage counts from here", path, error, aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = _open(path)

    def __repr__(self) -> str:
        return f"<UsageStore {self.path}>"

    def add(self, rows: Iterable[tuple[UsageKey, UsageCounts]]) -> None:
        """Adds the counts to those in the file, all or none of them. Raises sqlite3.Error."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(_ADD, ((*row, *msgspec.structs.astuple(counts)) for row, counts in rows))
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def read_tokens(self, key: str, month: str) -> int:
        """The tokens that a key has used in this month (``2026-11``). Raises sqlite3.Error."""
        ((tokens,),) = self._connection.execute(
            "SELECT COALESCE(SUM(prompt_tokens + answer_tokens), 0) FROM usage WHERE day BETWEEN ? AND ? AND key = ?",
            (f"{month}-01", f"{month}-31", key),
        )
        return int(tokens)

    def remove_before(self, day: str) -> None:
        """Removes the rows of all earlier days. Raises sqlite3.Error."""
        self._connection.execute("DELETE FROM usage WHERE day < ?", (day,))

    def checkpoint(self) -> None:
        """Folds the commits so far into the database, so that their file does not grow. Waits for the disk, and is
        called in a thread: it has a connection of its own."""
        with closing(_connect(self.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    """Opens the file, and makes it if it is missing: for our own user only, as are the files that SQLite makes
    beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600))
    connection = _connect(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchone()
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that never waits for another one: the event loop must not stand still."""
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def read_rows(path: Path, names: Sequence[str], *, since: str, key: str | None = None) -> list[tuple[object, ...]]:
    """The sums of the counts since a day, for each value of ``names`` (fields of ``UsageKey``): these values, then the
    counts in the order of ``COUNTS``. ``key``: of this key only. Works beside the process that writes, and without one.
    Returns no row if there is no file. Raises sqlite3.Error."""
    if not path.exists():
        return []
    assert set(names) <= set(UsageKey._fields), "a name that is no column"
    groups = ", ".join(names)
    columns = ", ".join([*names, *(f"SUM({name})" for name in COUNTS)])
    condition, values = ("day >= ?", [since]) if key is None else ("day >= ? AND key = ?", [since, key])
    query = f"SELECT {columns} FROM usage WHERE {condition} GROUP BY {groups}"  # noqa: S608 - only fields of UsageKey
    with closing(sqlite3.connect(path, timeout=READ_TIMEOUT_S, isolation_level=None)) as connection:
        connection.execute("PRAGMA query_only = 1")
        return connection.execute(query, values).fetchall()
