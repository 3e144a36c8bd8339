"""``UsageStore``: the counts of all requests in a SQLite file of the state folder, one row for each day, key, model and
node.

New counts go into a journal within milliseconds (``journal.py``), and into the database about once a second: a commit
takes 50 to 200 us, a line of the journal a tenth of that. Neither waits for the disk. So both survive a kill of the
process, and a loss of power may cost the last seconds. The commits' own file (WAL) is folded into the database by
``checkpoint``, which waits for the disk and runs in a thread.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from gpumesh.gateway.usage.counts import UsageCounts
from gpumesh.gateway.usage.journal import UsageJournal, UsageKey, UsageRow, read_journal

log = logging.getLogger(__name__)

KEPT_DAYS = 400  # older days are removed at the start: a year can be compared with the one before
READ_TIMEOUT_S = 2.0  # a reader may have to wait while the file is recovered after a kill
MAX_JOURNAL_SIZE = 256 << 10  # bytes; a longer journal is folded at once
DAMAGED_SUFFIX = ".damaged"
JOURNAL_SUFFIX = ".journal"
COUNTS = UsageCounts.__struct_fields__  # the columns of the table after those of UsageKey, in the same order

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, node TEXT NOT NULL,
    requests INTEGER NOT NULL, failed INTEGER NOT NULL, cancelled INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL,
    gpu_s REAL NOT NULL, energy_j REAL NOT NULL,
    PRIMARY KEY (day, key, model, node)
) WITHOUT ROWID
"""
_ADD = (
    f"INSERT INTO usage VALUES ({', '.join('?' * (4 + len(COUNTS)))}) ON CONFLICT DO UPDATE SET "  # noqa: S608
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
)


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
        except sqlite3.OperationalError:  # not damaged: a full disk, no right to write
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_name(path.name + DAMAGED_SUFFIX)
            log.warning("%s is damaged (%s): it is now %s, and usage counts from here", path, error, aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = _open(path)
        self._unfolded: dict[UsageKey, UsageCounts] = {}  # the rows that the database does not have yet
        number = _read_number(self._connection)
        for line_number, rows in read_journal(_journal_path(path)):  # of a mesh that was killed
            if line_number > number:
                self._remember(rows)
        self._journal = UsageJournal(_journal_path(path), number + 1)
        self.fold()

    def __repr__(self) -> str:
        return f"<UsageStore {self.path} {len(self._unfolded)} rows to fold>"

    def append(self, rows: Sequence[UsageRow]) -> None:
        """Adds the counts: to the journal now, and to the database with the next ``fold``. Raises OSError if the
        journal cannot be written. Then the counts are only in memory until the next ``fold``."""
        self._remember(rows)
        self._journal.append(rows)

    def _remember(self, rows: Iterable[UsageRow]) -> None:
        """Adds the counts to those that ``fold`` will write to the database."""
        for row, counts in rows:
            known = self._unfolded.get(row)
            if known is None:
                self._unfolded[row] = counts
            else:
                known.add(counts)

    @property
    def has_long_journal(self) -> bool:
        """Whether ``fold`` should not be waited for any longer."""
        return self._journal.size > MAX_JOURNAL_SIZE

    def fold(self) -> bool:
        """Moves the counts from the journal into the database. Returns whether there were any. Raises sqlite3.Error, or
        OSError; then the next call tries again."""
        if not self._unfolded:
            return False
        connection, number = self._connection, self._journal.number
        connection.execute("BEGIN IMMEDIATE")
        try:
            rows = self._unfolded.items()
            connection.executemany(_ADD, ((*row, *msgspec.structs.astuple(counts)) for row, counts in rows))
            connection.execute(f"PRAGMA user_version = {number:d}")  # a part of the transaction
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._unfolded = {}
        self._journal.clear(number + 1)
        return True

    def read_tokens(self, key: str, month: str) -> int:
        """The tokens that a key has used in this month (``2026-11``). Raises sqlite3.Error."""
        ((tokens,),) = self._connection.execute(
            "SELECT COALESCE(SUM(prompt_tokens + answer_tokens), 0) FROM usage WHERE day BETWEEN ? AND ? AND key = ?",
            (f"{month}-01", f"{month}-31", key),
        )
        for row, counts in self._unfolded.items():
            if row.key == key and row.day.startswith(month):
                tokens += counts.prompt_tokens + counts.answer_tokens
        return int(tokens)

    def remove_before(self, day: str) -> None:
        """Removes the rows of all earlier days. Raises sqlite3.Error."""
        self._connection.execute("DELETE FROM usage WHERE day < ?", (day,))

    def checkpoint(self) -> None:
        """Folds the commits so far into the database file, so that the file of commits does not grow. Waits for the
        disk, and is called in a thread: it has a connection of its own."""
        with closing(_connect(self.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self) -> None:
        """Closes both files."""
        self._connection.close()
        self._journal.close()


def read_rows(
    path: Path, names: Sequence[str], *, since: str, key: str | None = None
) -> Mapping[tuple[str, ...], UsageCounts]:
    """The sums of the counts since a day, by the values of ``names`` (fields of ``UsageKey``). ``key``: of this key
    only. Works beside the process that writes, and without one. Returns nothing if there is no file. Raises
    sqlite3.Error, or OSError."""
    if not path.exists():
        return {}
    assert set(names) <= set(UsageKey._fields), "a name that is no column"
    groups = ", ".join(names)
    columns = ", ".join([*names, *(f"SUM({name})" for name in COUNTS)])
    condition, values = ("day >= ?", [since]) if key is None else ("day >= ? AND key = ?", [since, key])
    query = f"SELECT {columns} FROM usage WHERE {condition} GROUP BY {groups}"  # noqa: S608 - only fields of UsageKey
    lines = read_journal(_journal_path(path))  # before the database: its number then tells which lines it has already
    with closing(sqlite3.connect(path, timeout=READ_TIMEOUT_S, isolation_level=None)) as connection:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("BEGIN")  # both questions see the same state
        number = _read_number(connection)
        sums: dict[tuple[str, ...], UsageCounts] = {}
        for row in connection.execute(query, values):
            counts = dict(zip(COUNTS, row[len(names) :], strict=True))
            sums[tuple(row[: len(names)])] = msgspec.convert(counts, UsageCounts)
    for line_number, rows in lines:
        for usage_key, counts_since in rows:
            is_asked = usage_key.day >= since and (key is None or usage_key.key == key)
            if line_number > number and is_asked:
                group = tuple(getattr(usage_key, name) for name in names)
                sums.setdefault(group, UsageCounts()).add(counts_since)
    return sums


def _journal_path(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL_SUFFIX)


def _open(path: Path) -> sqlite3.Connection:
    """Opens the database, and makes it if it is missing: for our own user only, as are the files that SQLite makes
    beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600))
    connection = _connect(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchone()  # ``checkpoint`` does this, in a thread
        connection.execute(_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that never waits for another one: the event loop must not stand still."""
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _read_number(connection: sqlite3.Connection) -> int:
    """The number of the last journal that the database has."""
    ((number,),) = connection.execute("PRAGMA user_version")
    return int(number)
