"""``Database``: the open SQLite file, with short transactions that never make the event loop wait for another process.

A commit writes to the file of commits (WAL) and does not wait for the disk: it outlives a kill of the process, and a
loss of power may cost the last seconds, never the file. The commits are folded into the database by a checkpoint, which
waits for the disk and therefore runs in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpumesh.batches.sqlite.schema import APPLICATION_ID, TABLES, VERSION
from gpumesh.errors import BatchStoreError
from gpumesh.tunnels.blocking import run_in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_TIMEOUT_S = 10.0  # so long a transaction waits for those of other processes, which take milliseconds
FIRST_BUSY_PAUSE_S = 0.001
LONGEST_BUSY_PAUSE_S = 0.02
COMMITS_PER_LOOK = 16  # so often the size of the file of commits is looked at
CHECKPOINT_BYTES = 4 << 20  # a longer file of commits is folded
_BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Database:
    """The file at ``path``. ``open`` makes it if it is missing, for our own user only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._wal_path = path.with_name(path.name + "-wal")
        self._status: os.stat_result | None = None  # of the open file
        self._is_folding = False  # a thread runs a checkpoint
        self._commits = 0

    def __repr__(self) -> str:
        return f"<Database {self.path} {'CLOSED' if self._connection is None else 'OPEN'}>"

    async def open(self) -> None:
        """Raises BatchStoreError if the file cannot be used, and leaves it as it is."""
        try:
            self._connection = _create_or_open(self.path)
            self._status = os.stat(self.path)
            if await self.read(partial(_check_owner, path=self.path)):
                await self.read(lambda connection: connection.execute("PRAGMA journal_mode = WAL").fetchone())
                await self.write(partial(_create_tables, path=self.path))
        except (sqlite3.Error, OSError) as error:
            self.close_connection()
            raise self._translate(error) from error
        except BaseException:
            self.close_connection()
            raise

    def close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``work`` in one transaction, and returns its result. ``work`` may be called again if another process
        was in the way; it awaits nothing. Raises BatchStoreError; an error of ``work`` undoes the transaction."""
        self._require_same_file()
        result = await self._run_when_free(lambda connection: _run_transaction(connection, work))
        self._commits += 1
        if self._commits % COMMITS_PER_LOOK == 0:
            await self._fold_if_long()
        return result

    async def write_in_pieces(self, work: Callable[[sqlite3.Connection], bool]) -> None:
        """Runs ``work`` in one transaction after the other, until it returns False. Other tasks run in between."""
        is_left = True
        while is_left:
            is_left = await self.write(work)
            await asyncio.sleep(0)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``work``, which only reads, and returns its result. Raises BatchStoreError."""
        return await self._run_when_free(work)

    async def _run_when_free(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs ``work`` again and again while the file is locked by another process."""
        loop = asyncio.get_running_loop()
        ends_at, pause_s = loop.time() + BUSY_TIMEOUT_S, FIRST_BUSY_PAUSE_S
        while True:
            if self._connection is None:
                raise BatchStoreError(f"the store of batches {self.path} is closed")
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                is_busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY_CODES
                if not is_busy or loop.time() > ends_at:
                    raise self._translate(error) from error
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_BUSY_PAUSE_S)

    def _require_same_file(self) -> None:
        """Raises BatchStoreError if the file that is open is not at its path any more: commands have another one."""
        try:
            is_same = self._status is not None and os.path.samestat(self._status, os.stat(self.path))
        except OSError:
            is_same = False
        if self._connection is not None and not is_same:
            message = f"the store of batches {self.path} was moved away or replaced while it was open"
            raise BatchStoreError(message, hint="`gpumesh down && gpumesh up -d` opens it anew")

    def data_version(self) -> int:
        """A number that changes when another process has changed the file. Raises BatchStoreError."""
        if self._connection is None:
            raise BatchStoreError(f"the store of batches {self.path} is closed")
        try:
            ((version,),) = self._connection.execute("PRAGMA data_version")
        except sqlite3.Error as error:
            raise self._translate(error) from error
        return int(version)

    async def _fold_if_long(self) -> None:
        """Folds the commits into the database if there are many. The caller waits for it, and nobody else."""
        try:
            is_long = self._wal_path.stat().st_size > CHECKPOINT_BYTES
        except OSError:
            is_long = False
        if self._is_folding or not is_long:
            return
        self._is_folding = True
        try:
            await run_in_thread(_fold_commits, self.path)
        except sqlite3.Error as error:  # the file of commits grows, and the next checkpoint may do better
            log.warning("no checkpoint of %s: %s", self.path, error, extra={"event": "batches"})
        finally:
            self._is_folding = False

    def _translate(self, error: sqlite3.Error | OSError) -> BatchStoreError:
        """The error for people. SQLite's own text says nothing about the file."""
        code = getattr(error, "sqlite_errorcode", None)
        reason = str(error) if not isinstance(error, OSError) else (error.strerror or str(error))
        hint = None
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            reason = f"the file is damaged, or is no SQLite file ({reason})"
            hint = (
                f"stop the mesh (`gpumesh down`) and move {self.path} away, with its -wal file, to begin with an empty"
                " store; its batches are lost unless you can repair it"
            )
        elif code == sqlite3.SQLITE_FULL:
            reason, hint = "the disk is full", "make room there"
        return BatchStoreError(f"the store of batches {self.path} cannot be used: {reason}", hint=hint)


def _create_or_open(path: Path) -> sqlite3.Connection:
    """A connection to the file, which is made if it is missing. Raises sqlite3.Error and OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600))
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchone()  # ``_fold_if_long`` does this, in a thread
    except BaseException:
        connection.close()
        raise
    return connection


def _check_owner(connection: sqlite3.Connection, *, path: Path) -> bool:
    """Returns whether the file is empty, so that the tables are to be made. Raises BatchStoreError if it is another
    program's, or of a newer version of gpumesh."""
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
    if not tables and not application:
        return True
    if application != APPLICATION_ID:
        raise BatchStoreError(f"{path}, the file for the batches, was made by another program", hint="move it away")
    if version > VERSION:
        message = f"{path}, the file with the batches, was made by a newer version of gpumesh"
        raise BatchStoreError(message, hint="use that version, or a newer one")
    return False


def _create_tables(connection: sqlite3.Connection, *, path: Path) -> None:
    """Makes the tables, unless another process has just made them."""
    if not _check_owner(connection, path=path):
        return
    for statement in TABLES.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {VERSION:d}")


def _run_transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Runs ``work`` between BEGIN and COMMIT; an error undoes all of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _fold_commits(path: Path) -> None:
    """Folds the commits into the database. It waits for the disk, and has a connection of its own, for its thread."""
    with closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
