"""The output file and the error file of a batch: for clients of OpenAI's API, made of the results on reading.

No store has such a file. Its id tells the batch and which of the two it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch, StoredFile

BATCH_PREFIX = "batch_"
FILE_PREFIX = "file-"
OUTPUT_PREFIX = "file-output-"
ERROR_PREFIX = "file-errors-"
RESULTS_AT_A_TIME = 100


@dataclass(frozen=True, slots=True)
class ResultFileId:
    """Which results a file has: those of ``batch_id`` that have failed, or those that have not."""

    batch_id: str
    failed: bool


def result_file_id(batch_id: str, *, failed: bool) -> str:
    """The id of the batch's error file (``failed``) or of its output file."""
    return (ERROR_PREFIX if failed else OUTPUT_PREFIX) + batch_id.removeprefix(BATCH_PREFIX)


def parse_result_file_id(file_id: str) -> ResultFileId | None:
    """What ``result_file_id`` was made of. ``None`` for the id of another file. The batch may not exist."""
    for prefix, failed in ((OUTPUT_PREFIX, False), (ERROR_PREFIX, True)):
        if file_id.startswith(prefix):
            return ResultFileId(BATCH_PREFIX + file_id.removeprefix(prefix), failed)
    return None


def result_file(batch: Batch, *, failed: bool) -> StoredFile | None:
    """The output file or the error file as it is now. ``None`` if it has no line: OpenAI's API has no empty ones."""
    counts = batch.counts
    size = counts.error_bytes if failed else counts.output_bytes
    if not size:
        return None
    return StoredFile(
        result_file_id(batch.id, failed=failed),
        f"{batch.id}_{'error' if failed else 'output'}.jsonl",
        size,
        batch.ended_at or batch.created_at,
        "batch_output",
        batch.new.owner,
    )


async def read_result_file(store: BatchStore, batch_id: str, *, failed: bool) -> AsyncIterator[bytes]:
    """The content of the file, in pieces, in the order in which the results were recorded. Raises as the store does."""
    after = ""
    while results := await store.read_results(batch_id, after=after, limit=RESULTS_AT_A_TIME, failed=failed):
        after = results[-1].position
        yield b"".join(result.content + b"\n" for result in results)
