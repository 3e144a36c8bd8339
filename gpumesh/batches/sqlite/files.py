"""The statements for files and their chunks. Each function is a short piece of work inside one transaction."""

# ruff: noqa: S608 - the parts of statements are texts of this room

from __future__ import annotations

from sqlite3 import Connection
from typing import Any

from gpumesh.batches.sqlite.schema import DELETED, WHOLE, WRITING
from gpumesh.batches.values import BatchStatus, StoredFile
from gpumesh.errors import BatchConflict, BatchNotFound

CHUNK_BYTES = 64 << 10  # of one row; the last chunk of a file is shorter
DELETED_CHUNKS = 8  # chunks that are deleted in one transaction

_COLUMNS = "id, name, size, created_at, purpose, owner"


def storable(text: str) -> str:
    """The text as SQLite can store it, and as it is looked for: with a question mark for each lone surrogate. The name
    of a file may have such, the ``custom_id`` of a line too."""
    return text.encode("utf-8", "replace").decode()


def begin_file(connection: Connection, file_id: str, name: str, purpose: str, owner: str, now: float) -> int:
    """Makes a file that nobody sees yet. Returns its number."""
    cursor = connection.execute(
        "INSERT INTO files (id, name, size, purpose, owner, created_at, used_at, state)"
        " VALUES (?, ?, 0, ?, ?, ?, ?, ?)",
        (file_id, storable(name), purpose, owner, now, now, WRITING),
    )
    assert cursor.lastrowid is not None, "an INSERT of one row has a row id"
    return cursor.lastrowid


def add_chunks(connection: Connection, number: int, first: int, chunks: list[bytes]) -> None:
    """Adds chunks of ``CHUNK_BYTES`` from the index ``first`` on. Raises BatchNotFound if the file has gone."""
    size = sum(map(len, chunks))
    changed = connection.execute(
        "UPDATE files SET size = size + ? WHERE number = ? AND state = ?", (size, number, WRITING)
    ).rowcount
    if not changed:
        raise BatchNotFound("the file was removed while it was written")
    rows = ((number, index, chunk) for index, chunk in enumerate(chunks, first))
    connection.executemany("INSERT INTO chunks VALUES (?, ?, ?)", rows)


def finish_file(connection: Connection, number: int) -> StoredFile:
    """Lets everybody see the file."""
    connection.execute("UPDATE files SET state = ? WHERE number = ?", (WHOLE, number))
    return _make_file(connection.execute(f"SELECT {_COLUMNS} FROM files WHERE number = ?", (number,)).fetchone())


def find_file(connection: Connection, file_id: str) -> tuple[int, StoredFile]:
    """The number of a file and its values. Raises BatchNotFound."""
    row = connection.execute(
        f"SELECT number, {_COLUMNS} FROM files WHERE id = ? AND state = ?", (storable(file_id), WHOLE)
    ).fetchone()
    if row is None:
        raise BatchNotFound(f"there is no file {file_id!r}")
    return row[0], _make_file(row[1:])


def list_files(connection: Connection, owner: str | None, after: str | None, limit: int) -> list[StoredFile]:
    """As ``BatchStore.list_files``."""
    conditions, values = ["state = ?"], [WHOLE]
    return [
        _make_file(row) for row in list_rows(connection, "files", _COLUMNS, conditions, values, owner, after, limit)
    ]


def list_rows(
    connection: Connection,
    table: str,
    columns: str,
    conditions: list[str],
    values: list[Any],
    owner: str | None,
    after: str | None,
    limit: int,
) -> list[tuple[Any, ...]]:
    """The rows of a table with ``created_at``, ``id`` and ``owner``, the newest first, after the row ``after``."""
    if owner is not None:
        conditions, values = [*conditions, "owner = ?"], [*values, owner]
    if after is not None:
        conditions = [*conditions, f"(created_at, id) < (SELECT created_at, id FROM {table} WHERE id = ?)"]
        values = [*values, storable(after)]
    query = f"SELECT {columns} FROM {table} WHERE {' AND '.join(conditions)} ORDER BY created_at DESC, id DESC LIMIT ?"
    return connection.execute(query, (*values, limit)).fetchall()


def read_range(connection: Connection, number: int, offset: int, size: int) -> bytes:
    """Bytes of a file that is there: ``size`` of them, fewer at the end of the file."""
    first, last = offset // CHUNK_BYTES, max(offset + size - 1, 0) // CHUNK_BYTES
    rows = connection.execute(
        "SELECT data FROM chunks WHERE file = ? AND number BETWEEN ? AND ? ORDER BY number", (number, first, last)
    )
    data = b"".join(data for (data,) in rows)
    begin = offset - first * CHUNK_BYTES
    return data[begin : begin + size]


def mark_deleted(connection: Connection, file_id: str) -> int:
    """Lets nobody see the file any more. Returns its number. Raises BatchNotFound, and BatchConflict if a batch needs
    it."""
    number, _ = find_file(connection, file_id)
    ended = [status.value for status in BatchStatus if status.has_ended]
    row = connection.execute(
        f"SELECT id FROM batches WHERE file = ? AND status NOT IN ({', '.join('?' * len(ended))}) LIMIT 1",
        (number, *ended),
    ).fetchone()
    if row is not None:
        raise BatchConflict(f"the batch {row[0]} needs the file {file_id}", hint="cancel it first, or wait for its end")
    connection.execute("UPDATE files SET state = ? WHERE number = ?", (DELETED, number))
    return number


def remove_chunks(connection: Connection, number: int) -> bool:
    """Removes some chunks of a file that nobody sees, and with the last ones the file. Returns whether any are left."""
    connection.execute(
        "DELETE FROM chunks WHERE rowid IN (SELECT rowid FROM chunks WHERE file = ? LIMIT ?)", (number, DELETED_CHUNKS)
    )
    if connection.execute("SELECT 1 FROM chunks WHERE file = ? LIMIT 1", (number,)).fetchone():
        return True
    connection.execute("DELETE FROM files WHERE number = ?", (number,))
    return False


def find_removable_file(connection: Connection, *, unused_before: float, begun_before: float) -> int | None:
    """The number of a file that is to be removed: deleted, never whole, or unused. Marks it as deleted."""
    row = connection.execute(
        "SELECT number FROM files WHERE state = ? OR (state = ? AND created_at < ?) OR (state = ? AND used_at < ?"
        " AND NOT EXISTS (SELECT 1 FROM batches WHERE batches.file = files.number)) LIMIT 1",
        (DELETED, WRITING, begun_before, WHOLE, unused_before),
    ).fetchone()
    if row is None:
        return None
    connection.execute("UPDATE files SET state = ? WHERE number = ?", (DELETED, row[0]))
    return int(row[0])


def _make_file(row: tuple[Any, ...]) -> StoredFile:
    file_id, name, size, created_at, purpose, owner = row
    return StoredFile(file_id, name, size, created_at, purpose, owner)
