"""The statements for batches as a whole: their status, their counts and their bad lines."""

# ruff: noqa: S608 - the parts of statements are texts of this room

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from sqlite3 import Connection
from typing import Any

from gpumesh.batches.sqlite.files import find_file, list_rows, storable
from gpumesh.batches.values import (
    MAX_KEPT_ERRORS,
    Batch,
    BatchCounts,
    BatchStatus,
    LineError,
    NewBatch,
    NewRequest,
)
from gpumesh.errors import BatchConflict, BatchNotFound

# The status of a batch whose rows are being deleted. Nobody sees such a batch.
DELETED_STATUS = "deleted"
ROWS_AT_A_TIME = 200  # rows of one batch that are changed in one transaction

_COLUMNS = (
    "number, id, endpoint, file_id, name, window_s, owner, metadata, status, created_at, expires_at, in_progress_at,"
    " cancelling_at, ended_at, read_lines, error_count, total, completed, failed, output_bytes, error_bytes"
)


def add_batch(connection: Connection, batch_id: str, new: NewBatch, now: float) -> Batch:
    """Adds a batch. Raises BatchNotFound if there is no such file."""
    file_number, _ = find_file(connection, new.input_file_id)
    connection.execute("UPDATE files SET used_at = ? WHERE number = ?", (now, file_number))
    connection.execute(
        "INSERT INTO batches (id, endpoint, file, file_id, name, window_s, owner, metadata, status, created_at,"
        " expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            batch_id,
            new.endpoint,
            file_number,
            new.input_file_id,
            storable(new.name),
            new.window_s,
            new.owner,
            json.dumps(dict(new.metadata)),
            BatchStatus.VALIDATING.value,
            now,
            now + new.window_s,
        ),
    )
    return get_batch(connection, batch_id, now)


def get_batch(connection: Connection, batch_id: str, now: float) -> Batch:
    """Raises BatchNotFound."""
    return _make_batch(connection, _find_row(connection, batch_id), now)


def list_batches(
    connection: Connection,
    owner: str | None,
    after: str | None,
    limit: int,
    statuses: Collection[BatchStatus] | None,
    now: float,
) -> list[Batch]:
    """As ``BatchStore.list_batches``."""
    wanted = [status.value for status in (BatchStatus if statuses is None else statuses)]
    conditions: list[str] = [f"status IN ({', '.join('?' * len(wanted))})"]
    rows = list_rows(connection, "batches", _COLUMNS, conditions, list(wanted), owner, after, limit)
    return [_make_batch(connection, row, now) for row in rows]


def find_number(connection: Connection, batch_id: str) -> int:
    """The number of a batch. Raises BatchNotFound."""
    return int(_find_row(connection, batch_id)[0])


def cancel_batch(connection: Connection, batch_id: str, now: float) -> Batch:
    """As ``BatchStore.cancel``."""
    batch = get_batch(connection, batch_id, now)
    if batch.status is BatchStatus.CANCELLED:
        return batch
    if batch.status.has_ended:
        raise BatchConflict(f"the batch {batch_id} has ended already: it is {batch.status}")
    if batch.status is not BatchStatus.CANCELLING:
        connection.execute(
            "UPDATE batches SET status = ?, cancelling_at = ? WHERE id = ?",
            (BatchStatus.CANCELLING.value, now, batch_id),
        )
    end_cancelled(connection, now)
    return get_batch(connection, batch_id, now)


def end_cancelled(connection: Connection, now: float) -> None:
    """Ends the batches that are CANCELLING and have no request under way."""
    connection.execute(
        "UPDATE batches SET status = ?, ended_at = ? WHERE status = ? AND NOT EXISTS (SELECT 1 FROM requests"
        " WHERE batch = batches.number AND worker IS NOT NULL AND leased_until > ?)",
        (BatchStatus.CANCELLED.value, now, BatchStatus.CANCELLING.value, now),
    )


def add_requests(
    connection: Connection,
    batch_id: str,
    requests: Sequence[NewRequest],
    errors: Sequence[LineError],
    *,
    after_line: int,
    through_line: int,
) -> bool:
    """As ``BatchStore.add_requests``."""
    number = find_number(connection, batch_id)
    changed = connection.execute(
        "UPDATE batches SET read_lines = ?, total = total + ?, error_count = error_count + ?"
        " WHERE number = ? AND status = ? AND read_lines = ?",
        (through_line, len(requests), len(errors), number, BatchStatus.VALIDATING.value, after_line),
    ).rowcount
    if not changed:
        return False
    connection.executemany(
        "INSERT INTO requests (batch, line, start, size, sort, prompt_group) VALUES (?, ?, ?, ?, ?, ?)",
        ((number, request.line, request.offset, request.size, request.order, request.group) for request in requests),
    )
    ((kept,),) = connection.execute("SELECT count(*) FROM line_errors WHERE batch = ?", (number,))
    connection.executemany(
        "INSERT INTO line_errors VALUES (?, ?, ?, ?)",
        (
            (number, error.line, error.code, storable(error.message))
            for error in errors[: max(MAX_KEPT_ERRORS - kept, 0)]
        ),
    )
    return True


def finish_validation(connection: Connection, batch_id: str, through_line: int, now: float) -> Batch:
    """As ``BatchStore.finish_validation``."""
    number = find_number(connection, batch_id)
    connection.execute(
        "UPDATE batches SET is_validated = 1, status = iif(total, ?, ?), in_progress_at = iif(total, ?, NULL),"
        " ended_at = iif(total, NULL, ?) WHERE number = ? AND status = ? AND read_lines = ?",
        (
            BatchStatus.IN_PROGRESS.value,
            BatchStatus.FAILED.value,
            now,
            now,
            number,
            BatchStatus.VALIDATING.value,
            through_line,
        ),
    )
    end_when_done(connection, number, now)  # after ``retry`` it may have all its results
    return get_batch(connection, batch_id, now)


def end_when_done(connection: Connection, number: int, now: float) -> None:
    """Ends a batch that is IN_PROGRESS or CANCELLING and has a result for each request."""
    ends = BatchStatus.EXPIRED.value, BatchStatus.COMPLETED.value
    connection.execute(
        "UPDATE batches SET status = iif(has_expired, ?, ?), ended_at = ?"
        " WHERE number = ? AND status IN (?, ?) AND is_validated AND completed + failed = total",
        (*ends, now, number, BatchStatus.IN_PROGRESS.value, BatchStatus.CANCELLING.value),
    )


def reopen_batch(connection: Connection, batch_id: str, now: float) -> tuple[int, int] | None:
    """The first step of ``BatchStore.retry``: the batch is worked on again. Returns its number and the position of its
    last result; ``None`` if there is nothing to send again. Raises as ``retry`` does."""
    batch = get_batch(connection, batch_id, now)
    if not batch.status.has_ended:
        raise BatchConflict(f"the batch {batch_id} has not ended: it is {batch.status}")
    if batch.status is BatchStatus.FAILED:
        raise BatchConflict(f"no line of the batch {batch_id} is a request", hint="submit a corrected file")
    number = find_number(connection, batch_id)
    ((is_validated,),) = connection.execute("SELECT is_validated FROM batches WHERE number = ?", (number,))
    if is_validated and not batch.counts.failed and not batch.counts.unfinished:
        return None
    try:
        find_file(connection, batch.new.input_file_id)
    except BatchNotFound as error:
        raise BatchConflict(f"the input file of the batch {batch_id} was deleted") from error
    connection.execute(
        "UPDATE requests SET tries = 0, lost = 0, not_before = 0 WHERE batch = ? AND has_result = 0 AND worker IS NULL",
        (number,),
    )
    mark_reopened(connection, number, now)
    ((position,),) = connection.execute("SELECT coalesce(max(position), 0) FROM results WHERE batch = ?", (number,))
    return number, int(position)


def mark_reopened(connection: Connection, number: int, now: float) -> None:
    """Lets the batch be worked on from now on, with a new window."""
    connection.execute(
        "UPDATE batches SET status = iif(is_validated, ?, ?), ended_at = NULL, cancelling_at = NULL, has_expired = 0,"
        " in_progress_at = iif(is_validated, ?, NULL), expires_at = ? + window_s WHERE number = ? AND status != ?",
        (BatchStatus.IN_PROGRESS.value, BatchStatus.VALIDATING.value, now, now, number, DELETED_STATUS),
    )


def mark_deleted(connection: Connection, batch_id: str, now: float) -> int:
    """Lets nobody see the batch any more. Returns its number. Raises BatchNotFound, and BatchConflict if it has not
    ended."""
    batch = get_batch(connection, batch_id, now)
    if not batch.status.has_ended:
        raise BatchConflict(f"the batch {batch_id} has not ended: it is {batch.status}", hint="cancel it first")
    number = find_number(connection, batch_id)
    connection.execute("UPDATE batches SET status = ? WHERE number = ?", (DELETED_STATUS, number))
    connection.execute("UPDATE files SET used_at = ? WHERE id = ?", (now, batch.new.input_file_id))
    return number


def find_removable_batch(connection: Connection, *, ended_before: float) -> int | None:
    """The number of a batch that is to be removed: deleted, or ended long ago. Marks it as deleted."""
    row = connection.execute(
        "SELECT number FROM batches WHERE status = ? OR ended_at < ? LIMIT 1", (DELETED_STATUS, ended_before)
    ).fetchone()
    if row is None:
        return None
    connection.execute("UPDATE batches SET status = ? WHERE number = ?", (DELETED_STATUS, row[0]))
    return int(row[0])


def remove_rows(connection: Connection, number: int) -> bool:
    """Removes some rows of a deleted batch, and with the last ones the batch. Returns whether any are left."""
    positions = [
        row[0]
        for row in connection.execute(
            "SELECT position FROM results WHERE batch = ? LIMIT ?", (number, ROWS_AT_A_TIME)
        ).fetchall()
    ]
    if positions:
        connection.executemany("DELETE FROM result_contents WHERE position = ?", ((value,) for value in positions))
        connection.executemany("DELETE FROM results WHERE position = ?", ((value,) for value in positions))
        return True
    lines = connection.execute("SELECT line FROM requests WHERE batch = ? LIMIT ?", (number, ROWS_AT_A_TIME)).fetchall()
    if lines:
        connection.executemany(
            "DELETE FROM requests WHERE batch = ? AND line = ?", ((number, line) for (line,) in lines)
        )
        return True
    connection.execute("DELETE FROM line_errors WHERE batch = ?", (number,))
    connection.execute("DELETE FROM batches WHERE number = ?", (number,))
    return False


def _find_row(connection: Connection, batch_id: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(
        f"SELECT {_COLUMNS} FROM batches WHERE id = ? AND status != ?", (storable(batch_id), DELETED_STATUS)
    ).fetchone()
    if row is None:
        raise BatchNotFound(f"there is no batch {batch_id!r}")
    return row


def _make_batch(connection: Connection, row: tuple[Any, ...], now: float) -> Batch:
    number, batch_id, endpoint, file_id, name, window_s, owner, metadata, status = row[:9]
    created_at, expires_at, in_progress_at, cancelling_at, ended_at, read_lines, error_count = row[9:16]
    total, completed, failed, output_bytes, error_bytes = row[16:]
    errors = connection.execute("SELECT line, code, message FROM line_errors WHERE batch = ? ORDER BY line", (number,))
    ((claimed,),) = connection.execute(
        "SELECT count(*) FROM requests WHERE batch = ? AND worker IS NOT NULL AND leased_until > ?", (number, now)
    )
    if status == BatchStatus.CANCELLING and not claimed:  # the last mesh was killed, and nobody has noted the end
        status, ended_at = BatchStatus.CANCELLED, cancelling_at
    return Batch(
        batch_id,
        NewBatch(endpoint, file_id, name, window_s, owner, json.loads(metadata)),
        BatchStatus(status),
        created_at,
        expires_at,
        BatchCounts(total, completed, failed, claimed, output_bytes, error_bytes),
        in_progress_at,
        cancelling_at,
        ended_at,
        read_lines,
        tuple(LineError(*error) for error in errors),
        error_count,
    )
