"""Finds the batches that a person means: by their ids, by the beginnings of their ids, or the latest."""

from __future__ import annotations

from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch
from gpumesh.errors import BatchNotFound, UsageError
from gpumesh.text.sentences import join_some

ID_PREFIX = "batch_"
MAX_LISTED = 1000  # the latest batches, among which the beginning of an id is looked for
_HINT = "`gpumesh batch list` shows all batches of this mesh.yaml"


async def find_batch(store: BatchStore, text: str | None) -> Batch:
    """The batch whose id is ``text``, or the only one whose id begins so, with or without ``batch_``; ``None``: the
    latest. Raises BatchNotFound if there is none, and UsageError if there are several."""
    if text is None:
        latest = await store.list_batches(limit=1)
        if not latest:
            raise BatchNotFound("there are no batches", hint="`gpumesh batch submit FILE` makes one")
        return latest[0]
    try:
        return await store.get_batch(text)
    except BatchNotFound as error:
        beginning = text if text.startswith(ID_PREFIX) else ID_PREFIX + text
        matches = [batch for batch in await store.list_batches(limit=MAX_LISTED) if batch.id.startswith(beginning)]
        if not matches or beginning == ID_PREFIX:
            raise BatchNotFound(f"there is no batch {text!r}", hint=_HINT) from error
    if len(matches) > 1:
        ids = join_some([batch.id for batch in matches], 4)
        raise UsageError(f"{text!r} is the beginning of several batches: {ids}", hint=_HINT)
    return matches[0]


async def read_latest(store: BatchStore, limit: int) -> list[Batch]:
    """The latest batches, ``limit`` at most. Raises BatchStoreError."""
    batches: list[Batch] = []
    while len(batches) < limit:
        after = batches[-1].id if batches else None
        page = await store.list_batches(after=after, limit=min(limit - len(batches), 100))
        if not page:
            break
        batches += page
    return batches
