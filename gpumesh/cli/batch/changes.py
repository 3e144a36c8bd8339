"""Changes the batches that a command names: sends them again, cancels them, removes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import COMMAND_LINE, Batch, BatchStatus
from gpumesh.cli.batch.find_batch import MAX_LISTED, find_batch
from gpumesh.cli.error_exit import print_error
from gpumesh.errors import BatchConflict, BatchError, BatchNotFound, GPUMeshError, UsageError
from gpumesh.text.quoting import paste_command


@dataclass(slots=True)
class Changes:
    """The batches that were changed, before and after it in the same order, and the errors with the others."""

    before: list[Batch] = field(default_factory=list)
    after: list[Batch] = field(default_factory=list)
    errors: list[GPUMeshError] = field(default_factory=list)

    def raise_errors(self) -> None:
        """Prints all errors but the last, and raises that one, if there is one."""
        for error in self.errors[:-1]:
            print_error(error)
        if self.errors:
            raise self.errors[-1]


async def change_batches(
    store: BatchStore, texts: Sequence[str], change: Callable[[BatchStore, Batch], Awaitable[Batch]]
) -> Changes:
    """Applies ``change`` to each batch that a text names. Raises BatchStoreError."""
    changes = Changes()
    for text in texts:
        try:
            before = await find_batch(store, text)
            after = await change(store, before)
        except (BatchNotFound, BatchConflict, UsageError) as error:
            changes.errors.append(error)
        else:
            changes.before.append(before)
            changes.after.append(after)
    return changes


async def retry_batch(store: BatchStore, batch: Batch) -> Batch:
    """Sends again what has failed or has no result. Raises BatchError."""
    if not batch.status.has_ended:
        raise _still_going_error(batch)
    if batch.status is BatchStatus.FAILED:
        raise BatchConflict(f"{batch.id} has no request: no line of its file could be sent")
    return await store.retry(batch.id)


async def cancel_batch(store: BatchStore, batch: Batch) -> Batch:
    """Cancels it. Returns it as CANCELLED if no request of it is under way. Raises BatchError."""
    await store.cancel(batch.id)
    await store.settle()  # a mesh that runs does this too, within seconds
    return await store.get_batch(batch.id)


async def remove_batch(store: BatchStore, batch: Batch) -> Batch:
    """Deletes it, and its input file unless that belongs to an API key or another batch has it too. Returns the batch
    as it was. Raises BatchError."""
    if not batch.status.has_ended:
        raise _still_going_error(batch)
    await store.delete_batch(batch.id)
    others = await store.list_batches(limit=MAX_LISTED)
    file_id = batch.new.input_file_id
    if batch.new.owner == COMMAND_LINE and not any(other.new.input_file_id == file_id for other in others):
        with suppress(BatchNotFound, BatchConflict):  # it is gone already, or another batch has it after all
            await store.delete_file(file_id)
    return batch


def _still_going_error(batch: Batch) -> BatchError:
    command = paste_command("gpumesh batch cancel {ID}", ID=batch.id)
    return BatchConflict(f"{batch.id} has not ended yet", hint=f"{command} ends it")
