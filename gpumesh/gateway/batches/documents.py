"""The documents of OpenAI's API for files and batches: https://platform.openai.com/docs/api-reference/batch. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpumesh.batches.result_files import result_file
from gpumesh.batches.values import KEPT_S, Batch, BatchStatus, StoredFile
from gpumesh.gateway.http.errors import BadRequest

Document = dict[str, Any]

ID_PATTERN = r"[A-Za-z0-9_-]{1,200}"  # of files and batches; other texts are no ids, and reach no store
MIN_WINDOW_S, MAX_WINDOW_S = 60.0, KEPT_S
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # in seconds
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")


def result_files(batch: Batch) -> list[StoredFile]:
    """The output file and the error file of a batch: none before its end, and no empty one."""
    if not batch.status.has_ended:
        return []
    files = (result_file(batch, failed=failed) for failed in (False, True))
    return [file for file in files if file is not None]


def describe_file(file: StoredFile) -> Document:
    """The document of a stored file."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at),
        "expires_at": None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def describe_batch(batch: Batch) -> Document:
    """The document of a batch. Bad lines of its input file are in ``errors``, and do not stop the others."""
    output, failures = (result_file(batch, failed=failed) for failed in (False, True))
    has_ended = batch.status.has_ended
    ended_at = {batch.status: _whole_seconds(batch.ended_at)}
    errors = None
    if batch.errors:
        lines = [
            {"code": error.code, "line": error.line or None, "message": error.message, "param": None}
            for error in batch.errors
        ]
        errors = {"object": "list", "data": lines}
    counts = batch.counts
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.new.endpoint,
        "errors": errors,
        "input_file_id": batch.new.input_file_id,
        "completion_window": format_window(batch.new.window_s),
        "status": batch.status.value,
        "output_file_id": output.id if output is not None and has_ended else None,
        "error_file_id": failures.id if failures is not None and has_ended else None,
        "created_at": int(batch.created_at),
        "in_progress_at": _whole_seconds(batch.in_progress_at),
        "expires_at": int(batch.expires_at),
        "finalizing_at": None,
        "completed_at": ended_at.get(BatchStatus.COMPLETED),
        "failed_at": ended_at.get(BatchStatus.FAILED),
        "expired_at": ended_at.get(BatchStatus.EXPIRED),
        "cancelling_at": _whole_seconds(batch.cancelling_at),
        "cancelled_at": ended_at.get(BatchStatus.CANCELLED),
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        "metadata": dict(batch.new.metadata) or None,
    }


def describe_list(documents: Sequence[Document], *, has_more: bool) -> Document:
    """A page of a list."""
    return {
        "object": "list",
        "data": list(documents),
        "first_id": documents[0]["id"] if documents else None,
        "last_id": documents[-1]["id"] if documents else None,
        "has_more": has_more,
    }


def _whole_seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


# -- what a client sends ---------------------------------------------------------------------------------------------


def read_window(value: object) -> float:
    """The seconds of ``completion_window``. OpenAI takes ``24h`` only; here it is any time from a minute to 30 days.
    Raises BadRequest for another value."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = 0.0 if match is None else float(match[1]) * _UNITS[match[2]]
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise BadRequest("completion_window is a time from 1m to 30d, such as 24h")
    return seconds


def format_window(seconds: float) -> str:
    """Writes what ``read_window`` reads, in the largest unit up to hours: OpenAI writes ``24h``, and not ``1d``."""
    unit = next((unit for unit in ("h", "m") if seconds % _UNITS[unit] == 0), "s")
    return f"{int(seconds // _UNITS[unit])}{unit}"


def read_metadata(value: object) -> Mapping[str, str]:
    """The pairs of ``metadata``. Raises BadRequest for what OpenAI's API does not allow."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA_PAIRS:
        raise BadRequest(f"metadata is an object of at most {MAX_METADATA_PAIRS} texts")
    for name, text in value.items():
        if not isinstance(text, str) or len(text) > MAX_METADATA_VALUE_CHARS or len(name) > MAX_METADATA_KEY_CHARS:
            raise BadRequest(
                f"metadata has names of at most {MAX_METADATA_KEY_CHARS} characters"
                f" and texts of at most {MAX_METADATA_VALUE_CHARS}"
            )
        try:
            (name + text).encode()
        except UnicodeEncodeError:
            raise BadRequest("metadata has a text that is no Unicode") from None
    return value
