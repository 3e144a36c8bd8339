"""The document of ``--json``: batches for programs, of the schema ``gpumesh.batch/1``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from gpumesh.batches.progress import BatchProgress
from gpumesh.wire import to_json

SCHEMA = "gpumesh.batch/1"


def make_document(batches: Sequence[BatchProgress]) -> dict[str, Any]:
    """The whole document."""
    return {"schema": SCHEMA, "batches": [_make_entry(progress) for progress in batches]}


def _make_entry(progress: BatchProgress) -> dict[str, Any]:
    """A batch for programs."""
    batch, counts, left_s = progress.batch, progress.batch.counts, progress.left_s
    return {
        "id": batch.id,
        "name": batch.new.name,
        "status": batch.status.value,
        "endpoint": batch.new.endpoint,
        "total": counts.total,
        "completed": counts.completed,
        "failed": counts.failed,
        "in_flight": counts.claimed,
        "rate_per_s": None if progress.rate_per_s is None else round(progress.rate_per_s, 3),
        "left_s": None if left_s is None else round(left_s, 1),
        "created_at": _format_time(batch.created_at),
        "expires_at": _format_time(batch.expires_at),
        "in_progress_at": _format_time(batch.in_progress_at),
        "cancelling_at": _format_time(batch.cancelling_at),
        "ended_at": _format_time(batch.ended_at),
        "result_bytes": counts.output_bytes + counts.error_bytes,
        "wrong_lines": batch.error_count,
        "errors": to_json(batch.errors),
        "errors_seen": None if progress.errors is None else to_json(progress.errors.errors),
        "waits_behind": None if progress.wait is None else progress.wait.running_id,
        "input_file_id": batch.new.input_file_id,
        "key": batch.new.owner or None,
        "metadata": dict(batch.new.metadata),
    }


def _format_time(seconds: float | None) -> Any:
    return None if seconds is None else to_json(datetime.fromtimestamp(seconds, UTC))
