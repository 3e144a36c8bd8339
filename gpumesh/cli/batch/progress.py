"""How a batch comes on: its rate, the time that is left, and the document that programs get of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch, BatchStatus
from gpumesh.wire import to_json

SCHEMA = "gpumesh.batch/1"
# The rate is that of the shorter time, unless so few results came in it that it could be chance.
RATE_TIMES_S = (60.0, 600.0)
MIN_RESULTS = 20


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """A batch, and how fast it comes on. ``rate_per_s``: results per second of the last minutes; ``None`` if the batch
    is not worked on by its status."""

    batch: Batch
    rate_per_s: float | None = None

    @property
    def left_s(self) -> float | None:
        """The seconds until the last result, if the rate stays as it is; ``None`` if that is not known."""
        if not self.rate_per_s or self.batch.status is not BatchStatus.IN_PROGRESS:
            return None
        return self.batch.counts.unfinished / self.rate_per_s


async def measure_progress(store: BatchStore, batch: Batch, now: float) -> BatchProgress:
    """The batch with its rate. ``now``: seconds since 1970. Raises BatchError."""
    if batch.status is not BatchStatus.IN_PROGRESS:
        return BatchProgress(batch)
    age_s = max(now - (batch.in_progress_at or batch.created_at), 1.0)
    rate_per_s = 0.0
    for time_s in RATE_TIMES_S:
        count = await store.count_recent_results(batch.id, time_s)
        rate_per_s = count / min(time_s, age_s)
        if count >= MIN_RESULTS or age_s <= time_s:
            break
    return BatchProgress(batch, rate_per_s)


def make_document(batches: Sequence[BatchProgress]) -> dict[str, Any]:
    """The document of ``--json``, of the schema ``gpumesh.batch/1``."""
    return {"schema": SCHEMA, "batches": [make_entry(progress) for progress in batches]}


def make_entry(progress: BatchProgress) -> dict[str, Any]:
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
        "input_file_id": batch.new.input_file_id,
        "key": batch.new.owner or None,
        "metadata": dict(batch.new.metadata),
    }


def _format_time(seconds: float | None) -> Any:
    return None if seconds is None else to_json(datetime.fromtimestamp(seconds, UTC))
