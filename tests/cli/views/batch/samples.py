"""Hand-made batches, as a store would give them."""

from __future__ import annotations

from typing import Any

from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchCounts, BatchStatus, LineError, NewBatch

NOW = 1_800_000_000.0
COUNTS = BatchCounts(total=50_000, completed=24_112, failed=12, claimed=8, output_bytes=21 << 20, error_bytes=1200)


def batch(status: BatchStatus, *, age_s: float = 720.0, **changes: Any) -> Batch:
    """A batch of prompts that was made ``age_s`` seconds ago, and has ended now if its status is a last one."""
    new: dict[str, Any] = {"name": "prompts.jsonl", "endpoint": PROMPT_ENDPOINT, "owner": ""}
    new |= {name: changes.pop(name) for name in tuple(new) if name in changes}
    made_at = NOW - age_s
    usual: dict[str, Any] = {
        "counts": COUNTS,
        "in_progress_at": made_at + 2,
        "ended_at": NOW - 60 if status.has_ended else None,
    }
    made = NewBatch(input_file_id="file-1", **new)
    return Batch("batch_6f3a", made, status, made_at, made_at + made.window_s, **{**usual, **changes})


ENDED = batch(BatchStatus.COMPLETED, counts=BatchCounts(2000, 1988, 12, output_bytes=5000, error_bytes=80), age_s=1560)
WRONG_LINES = tuple(LineError(line, "invalid_prompt", "unknown key 'promt'") for line in range(17, 117))
ALL = (
    batch(BatchStatus.IN_PROGRESS),
    batch(BatchStatus.VALIDATING, counts=BatchCounts(total=24_000), read_lines=24_000, in_progress_at=None, age_s=3.0),
    ENDED,
    batch(BatchStatus.CANCELLING, cancelling_at=NOW - 2),
    batch(BatchStatus.CANCELLED, name="nightly \x1b[31mred " + "x" * 200, owner="nightly"),
    batch(BatchStatus.EXPIRED, endpoint="/v1/chat/completions", errors=WRONG_LINES, error_count=140),
    batch(BatchStatus.FAILED, counts=BatchCounts(), errors=WRONG_LINES[:1], error_count=1),
)
