"""Stores a submitted file, makes a batch of it, and tells which of its lines are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from gpumesh.batches.base import BatchStore
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import Batch, BatchStatus, NewBatch
from gpumesh.cli.batch.submitted_file import SubmittedFile
from gpumesh.errors import BatchError, BatchStoreError, UsageError
from gpumesh.text.quoting import paste_command

CHUNK_BYTES = 1 << 18
MAX_WRONG_LINES = 20  # so many are listed; the others are counted


async def submit_file(store: BatchStore, submitted: SubmittedFile, *, name: str, window_s: float) -> Batch:
    """Stores the file and makes a batch of it, which has its requests when this returns; a running mesh may have begun
    with it by then. When this is cancelled, the batch is cancelled too.

    Raises UsageError with the wrong lines if no line is right, and as ``SubmittedFile.read`` does: then nothing is
    stored. Raises BatchError if the store cannot be used, and then the batch is cancelled, if that is possible."""
    file = await store.create_file(name, _read_chunks(submitted))
    try:
        new = NewBatch(submitted.endpoint, file.id, name=name, window_s=window_s)
        batch = await store.create_batch(new)
    except BaseException:
        await store.delete_file(file.id)
        raise
    try:
        batch = await validate_batch(store, batch.id)
    except asyncio.CancelledError:  # Ctrl-C: otherwise a mesh would go on with what a person has just stopped
        await store.cancel(batch.id)
        raise
    except BatchStoreError as error:  # otherwise a mesh would go on with what a person submits once more
        try:
            await store.cancel(batch.id)
        except BatchStoreError:
            command = paste_command("gpumesh batch cancel {ID}", ID=batch.id)
            hint = f"a part of the file is stored: {command} before you submit it once more"
            raise BatchStoreError(error.message, hint=hint) from error
        except BatchError:  # a mesh has read the file meanwhile, and the batch has ended
            pass
        raise
    if batch.status is BatchStatus.FAILED:
        await store.delete_batch(batch.id)
        await store.delete_file(file.id)
        raise UsageError(
            "\n".join([f"{submitted.name} has no line that can be sent", *list_wrong_lines(batch, submitted.name)])
        )
    return batch


async def _read_chunks(submitted: SubmittedFile) -> AsyncIterator[bytes]:
    """The lines of the input file in chunks. Other tasks run between two chunks. Raises as ``SubmittedFile.read``
    does."""
    lines: list[bytes] = []
    size = 0
    for line in submitted.read():
        lines.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield b"".join(lines)
            await asyncio.sleep(0)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def list_wrong_lines(batch: Batch, name: str) -> list[str]:
    """A line of text for each wrong line of the file that is called ``name``, for the first of them."""
    shown = batch.errors[:MAX_WRONG_LINES]
    texts = [f"{name}:{error.line}: {error.message}" if error.line else f"{name}: {error.message}" for error in shown]
    hidden_count = batch.error_count - len(shown)
    return [*texts, f"… and {hidden_count:,} more"] if hidden_count > 0 else texts
