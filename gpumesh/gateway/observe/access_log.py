"""The access log: a JSON line for each request, from its ``RequestRecord``, the client's address and the request id.

No line holds a prompt, an answer, a header or a query. Lines are collected and written a moment later, so that no
request waits for the disk. When the disk is full the log loses lines, but no request fails. Only the gateway's own user
can read the file. The file is rotated by size.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import msgspec

from gpumesh.gateway.observe.record import RequestRecord

log = logging.getLogger(__name__)

# Lines are written FLUSH_S after the first of them, or when there are FLUSH_LINES.
FLUSH_S = 0.5
FLUSH_LINES = 500
ROTATE_BYTES = 8 << 20  # a file that would become larger is rotated
ROTATED_FILES = 4  # so many older files are kept
MAX_TEXT_CHARS = 200  # a text that a client sends (a path, a model) is cut to this length

_encoder = msgspec.json.Encoder()  # takes a tenth of the time of json.dumps


class AccessEntry(msgspec.Struct, gc=False):
    """The line of one request. Its fields are the keys, in this order.

    ``at`` is the time at which the request ended. ``status`` is ``None`` if nothing was sent. ``node`` is the node
    where the answer began; without an answer, the node that got the request last. Only streamed answers have
    ``ttft_ms``. ``bytes`` is the size of the body; the size of a stream includes the framing."""

    at: str
    client: str | None
    method: str
    path: str
    status: int | None
    outcome: str | None
    model: str | None
    node: str | None
    attempts: int
    continuations: int
    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float
    bytes: int
    id: str | None


class AccessLog:
    """The log at ``path``. ``now`` returns seconds of Unix time."""

    def __init__(
        self,
        path: Path,
        *,
        rotate_bytes: int = ROTATE_BYTES,
        rotated_files: int = ROTATED_FILES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._rotated_files = rotated_files
        self._now = now
        self._pending: list[AccessEntry] = []  # entries that are not in the file yet
        self._timer: asyncio.TimerHandle | None = None  # runs until the next write to the file
        self._file: int | None = None  # the file's descriptor
        self._size = 0  # of the file, in bytes
        self._failing = False  # whether the last write has failed

    def add(self, record: RequestRecord, *, client: str | None, request_id: str | None) -> None:
        """Adds a request that has ended. Two of its facts are not in the record: ``client``, the client's address, and
        ``request_id``, the id of ``X-Request-Id``."""
        self._pending.append(build_entry(record, self._now(), client=client, request_id=request_id))
        if len(self._pending) >= FLUSH_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def __repr__(self) -> str:
        phase = "not open" if self._file is None else "open"
        if self._failing:
            phase = "failing"
        return f"<AccessLog {self._path} {phase} {len(self._pending)} pending>"

    def flush(self) -> None:
        """Writes the pending lines now. If that fails, the lines are lost, and the first failure is logged."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        entries, self._pending = self._pending, []
        if not entries:
            return
        data = render_lines(entries)
        try:
            self._write(data)
            self._failing = False
        except OSError as error:
            if not self._failing:  # logged once, not for each half second of a full disk
                log.warning("the access log cannot be written: %s", error.strerror, extra={"event": "access-log"})
            self._failing = True

    def close(self) -> None:
        """Writes the pending lines and closes the file."""
        self.flush()
        self._close_file()

    def _write(self, data: bytes) -> None:
        """Appends the data to the file, or to a new file if the file would become too large. Raises OSError."""
        if self._file is None:
            self._open_file()
        would_be_too_large = self._size + len(data) > self._rotate_bytes
        if would_be_too_large and self._size > 0:  # an empty file takes data of any size
            self._close_file()
            self._rotate()
            self._open_file()
        assert self._file is not None, "the log's file is not open"
        while data:  # one call may write only a part
            written = os.write(self._file, data)
            self._size += written
            data = data[written:]

    def _open_file(self) -> None:
        """Opens the file, and creates it and its folder if they are missing, for the gateway's own user only."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _rotate(self) -> None:
        """``access.jsonl`` becomes ``access.jsonl.1``, which becomes ``.2`` and so on. The oldest file is removed."""
        for number in range(self._rotated_files, 0, -1):  # the oldest first: each file takes the name that became free
            path = self._path if number == 1 else self._rotated_path(number - 1)
            if path.exists():
                path.replace(self._rotated_path(number))

    def _rotated_path(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def render_lines(entries: Sequence[AccessEntry]) -> bytes:
    """The entries as lines of ASCII: a client's text may hold control characters, and a terminal must not act on them
    when a person reads the file."""
    try:
        lines = _encoder.encode_lines(entries)
    except ValueError:  # a text has half of a surrogate pair, which UTF-8 cannot hold
        lines = None
    if lines is None or not lines.isascii():  # slower, but it escapes every character beyond ASCII
        return b"".join([json.dumps(msgspec.structs.asdict(entry)).encode() + b"\n" for entry in entries])
    return lines


def format_time(at: float) -> str:
    """The time (seconds of Unix time) in UTC with milliseconds: ``2026-11-30T08:00:00.123Z``."""
    milliseconds = int(at * 1000.0)
    return f"{_format_seconds(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


@lru_cache(maxsize=2)  # the text is the same for a second
def _format_seconds(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()


def build_entry(record: RequestRecord, at: float, *, client: str | None, request_id: str | None) -> AccessEntry:
    """The entry of one request. ``at`` is the time at which the request ended, in seconds of Unix time."""
    answer, demand, progress = record.answer, record.demand, record.progress
    if answer is not None:
        attempts, continuations, queue_ms = answer.attempts, answer.continuations, answer.queue_ms
        has_waited = True
    else:
        attempts, continuations, queue_ms = progress.attempts, 0, progress.queue_s * 1000.0
        has_waited = attempts > 0 or queue_ms > 0.0
    ttft_ms = None
    is_streamed = answer is not None and answer.body is None
    if is_streamed and record.first_byte_at is not None:
        ttft_ms = round((record.first_byte_at - record.started_at) * 1000.0, 1)
    return AccessEntry(
        format_time(at),
        client,
        record.method,
        record.path[:MAX_TEXT_CHARS],
        record.status or None,
        record.outcome,
        None if demand is None or demand.model is None else demand.model[:MAX_TEXT_CHARS],
        record.node,
        attempts,
        continuations,
        round(queue_ms, 1) if has_waited else None,
        ttft_ms,
        round((record.ended_at - record.started_at) * 1000.0, 1),
        record.sent_bytes,
        request_id,
    )
