"""The statements for the requests of batches: claims, and the results that end them."""

# ruff: noqa: S608 - the parts of statements are texts of this room

from __future__ import annotations

from collections.abc import Collection, Sequence
from sqlite3 import Connection
from typing import NamedTuple

from gpumesh.batches.retries import LONGEST_WAIT_S
from gpumesh.batches.sqlite.batches import (
    DELETED_STATUS,
    ROWS_AT_A_TIME,
    end_cancelled,
    end_when_done,
    find_number,
    mark_reopened,
)
from gpumesh.batches.sqlite.files import read_range
from gpumesh.batches.values import MAX_CLAIM_BYTES, BatchStatus, Claim, RecordedResult, Release, Result

MAX_READ_BYTES = 4 << 20  # results of one call of ``read_results``; at least one result


class ClaimedRow(NamedTuple):
    """A request that was just claimed, and where its line stands."""

    claim: Claim
    file: int
    start: int
    size: int


def free_claims(connection: Connection) -> None:
    """Frees everything that a killed worker had claimed."""
    connection.execute(
        "UPDATE requests SET worker = NULL, leased_until = NULL, lost = lost + 1 WHERE worker IS NOT NULL"
    )


def claim_requests(
    connection: Connection, worker: str, count: int, lease_s: float, without: Collection[str], now: float
) -> list[ClaimedRow]:
    """As ``BatchStore.claim``, without the contents. A ``not_before`` that is later than any delay ends was written
    before the clock was set back: such a request waits no longer."""
    batches = connection.execute(
        "SELECT number, id, endpoint, owner, file, expires_at FROM batches WHERE status = ? ORDER BY created_at, id",
        (BatchStatus.IN_PROGRESS.value,),
    ).fetchall()
    claimed: list[ClaimedRow] = []
    byte_count = 0
    for number, batch_id, endpoint, owner, file, expires_at in batches:
        if batch_id in without and expires_at > now:
            continue
        connection.execute(
            "UPDATE requests SET worker = NULL, leased_until = NULL, lost = lost + 1"
            " WHERE batch = ? AND worker IS NOT NULL AND leased_until <= ?",
            (number, now),
        )
        rows = connection.execute(
            "SELECT line, start, size, prompt_group, tries, lost FROM requests WHERE batch = ? AND has_result = 0"
            " AND worker IS NULL AND (not_before <= ? OR not_before > ? OR ? > ?) ORDER BY sort, line LIMIT ?",
            (number, now, now + LONGEST_WAIT_S, now, expires_at, count - len(claimed)),
        ).fetchall()
        for line, start, size, group, tries, lost in rows:
            byte_count += size
            if claimed and byte_count > MAX_CLAIM_BYTES:
                return claimed
            connection.execute(
                "UPDATE requests SET worker = ?, leased_until = ? WHERE batch = ? AND line = ?",
                (worker, now + lease_s, number, line),
            )
            claim = Claim(batch_id, line, b"", endpoint, owner, group, expires_at, tries, lost)
            claimed.append(ClaimedRow(claim, file, start, size))
        if len(claimed) >= count:
            break
    return claimed


def read_content(connection: Connection, row: ClaimedRow) -> bytes:
    """The bytes of the line of a claimed request."""
    return read_range(connection, row.file, row.start, row.size)


def renew_claims(
    connection: Connection, worker: str, claims: Collection[Claim], lease_s: float, now: float
) -> set[tuple[str, int]]:
    """As ``BatchStore.renew``."""
    unwanted = set()
    for claim in claims:
        changed = connection.execute(
            "UPDATE requests SET leased_until = ? WHERE worker = ? AND line = ? AND batch ="
            " (SELECT number FROM batches WHERE id = ? AND status NOT IN (?, ?))",
            (now + lease_s, worker, claim.line, claim.batch_id, BatchStatus.CANCELLING.value, DELETED_STATUS),
        ).rowcount
        if not changed:
            unwanted.add(claim.key)
    return unwanted


def release_claims(connection: Connection, worker: str, releases: Sequence[Release], now: float) -> None:
    """As ``BatchStore.release``."""
    for release in releases:
        connection.execute(
            "UPDATE requests SET worker = NULL, leased_until = NULL, not_before = ?, tries = tries + ?"
            " WHERE worker = ? AND line = ? AND batch = (SELECT number FROM batches WHERE id = ?)",
            (
                now + release.delay_s,
                int(release.counts),
                worker,
                release.claim.line,
                release.claim.batch_id,
            ),
        )
    end_cancelled(connection, now)


def record_results(connection: Connection, results: Sequence[Result], now: float) -> int:
    """As ``BatchStore.record``."""
    new_count = 0
    numbers: dict[str, int | None] = {}
    for result in results:
        batch_id = result.claim.batch_id
        if batch_id not in numbers:
            row = connection.execute(
                "SELECT number FROM batches WHERE id = ? AND status != ?", (batch_id, DELETED_STATUS)
            ).fetchone()
            numbers[batch_id] = None if row is None else row[0]
        number = numbers[batch_id]
        if number is not None:
            new_count += _record(connection, number, result, now)
    for number in numbers.values():
        if number is not None:
            end_when_done(connection, number, now)
    end_cancelled(connection, now)
    return new_count


def _record(connection: Connection, number: int, result: Result, now: float) -> bool:
    """Stores a result, unless the request has one. Returns whether it was stored."""
    line, size = result.claim.line, len(result.content) + 1  # with the line break
    is_new = connection.execute(
        "UPDATE requests SET has_result = 1, worker = NULL, leased_until = NULL"
        " WHERE batch = ? AND line = ? AND has_result = 0",
        (number, line),
    ).rowcount
    if not is_new:
        return False
    cursor = connection.execute(
        "INSERT INTO results (batch, line, failed, size, recorded_at) VALUES (?, ?, ?, ?, ?)",
        (number, line, int(result.failed), size, now),
    )
    connection.execute("INSERT INTO result_contents VALUES (?, ?)", (cursor.lastrowid, result.content))
    if result.failed:
        changes = "failed = failed + 1, error_bytes = error_bytes + ?, has_expired = has_expired OR ?"
    else:
        changes = "completed = completed + 1, output_bytes = output_bytes + ?, has_expired = has_expired OR ?"
    connection.execute(f"UPDATE batches SET {changes} WHERE number = ?", (size, int(result.expired), number))
    return True


def reopen_failed(connection: Connection, number: int, last_position: int, now: float) -> bool:
    """Removes some of the failed results up to a position, so that their requests are sent again. Returns whether there
    were any."""
    rows = connection.execute(
        "SELECT position, line, size FROM results WHERE batch = ? AND failed = 1 AND position <= ? LIMIT ?",
        (number, last_position, ROWS_AT_A_TIME),
    ).fetchall()
    if not rows:
        return False
    connection.executemany("DELETE FROM results WHERE position = ?", ((position,) for position, _, _ in rows))
    connection.executemany("DELETE FROM result_contents WHERE position = ?", ((position,) for position, _, _ in rows))
    connection.executemany(
        "UPDATE requests SET has_result = 0, tries = 0, lost = 0, not_before = 0 WHERE batch = ? AND line = ?",
        ((number, line) for _, line, _ in rows),
    )
    connection.execute(
        "UPDATE batches SET failed = failed - ?, error_bytes = error_bytes - ? WHERE number = ?",
        (len(rows), sum(size for _, _, size in rows), number),
    )
    mark_reopened(connection, number, now)
    return True


def read_results(
    connection: Connection, batch_id: str, after: str, limit: int, failed: bool | None
) -> list[RecordedResult]:
    """As ``BatchStore.read_results``."""
    condition, values = ("", ()) if failed is None else (" AND failed = ?", (int(failed),))
    return _read(connection, batch_id, f"position > ?{condition} ORDER BY position", (int(after or 0), *values), limit)


def read_results_by_line(connection: Connection, batch_id: str, after_line: int, limit: int) -> list[RecordedResult]:
    """As ``BatchStore.read_results_by_line``."""
    return _read(connection, batch_id, "line > ? ORDER BY line", (after_line,), limit)


def _read(
    connection: Connection, batch_id: str, condition: str, values: tuple[int, ...], limit: int
) -> list[RecordedResult]:
    number = find_number(connection, batch_id)
    results: list[RecordedResult] = []
    byte_count = 0
    rows = connection.execute(
        f"SELECT position, line, failed, size FROM results WHERE batch = ? AND {condition} LIMIT ?",
        (number, *values, limit),
    ).fetchall()
    for position, line, has_failed, size in rows:
        byte_count += size
        if results and byte_count > MAX_READ_BYTES:
            break
        ((content,),) = connection.execute("SELECT content FROM result_contents WHERE position = ?", (position,))
        results.append(RecordedResult(str(position), line, content, bool(has_failed)))
    return results


def count_recent_results(connection: Connection, batch_id: str, since: float) -> int:
    """How many results of the batch were recorded since a time."""
    ((count,),) = connection.execute(
        "SELECT count(*) FROM results WHERE batch = ? AND recorded_at >= ?", (find_number(connection, batch_id), since)
    )
    return int(count)
