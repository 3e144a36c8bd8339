"""Why a batch is as it is: the commonest errors of its failed requests, and the older batch that it waits behind.

Both follow from what the store has anyway. What they cost is bounded, however large the batch is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.error_text import describe_error, describe_web_page, is_web_page
from gpumesh.batches.base import BatchStore
from gpumesh.batches.values import Batch, BatchStatus

MAX_READ_RESULTS = 200  # failed results that are looked at
MAX_READ_BYTES = 8 << 20  # no more results are read when those read so far are so long
MAX_MESSAGES = 10  # different messages that are kept, the commonest ones
MAX_OLDER = 1000  # older batches that are looked at
UNREADABLE = "its result cannot be read"


@dataclass(frozen=True, slots=True)
class SeenError:
    """The message of ``count`` failed requests: one line, safe to print, of about 300 characters at most."""

    message: str
    count: int


@dataclass(frozen=True, slots=True)
class SeenErrors:
    """The commonest ``errors`` of the first ``read_count`` failed requests, the commonest first."""

    errors: tuple[SeenError, ...] = ()
    read_count: int = 0


@dataclass(frozen=True, slots=True)
class BatchWait:
    """A batch waits behind the batch ``running_id``, which is worked on now. ``older_count``: how many batches in
    progress are older than the waiting one, with the running one."""

    running_id: str
    older_count: int = 1


async def find_errors(store: BatchStore, batch: Batch) -> SeenErrors:
    """What the first failed requests of a batch have failed with. Raises BatchError."""
    if not batch.counts.failed:
        return SeenErrors()
    messages: Counter[str] = Counter()
    position, count, byte_count = "", 0, 0
    while count < MAX_READ_RESULTS and byte_count < MAX_READ_BYTES:
        limit = MAX_READ_RESULTS - count
        results = await store.read_results(batch.id, after=position, limit=limit, failed=True)
        if not results:
            break
        position = results[-1].position
        count += len(results)
        byte_count += sum(len(result.content) for result in results)
        messages.update(read_error(result.content) for result in results)
    commonest = messages.most_common(MAX_MESSAGES)
    return SeenErrors(tuple(SeenError(message, seen) for message, seen in commonest), count)


async def find_wait(store: BatchStore, batch: Batch) -> BatchWait | None:
    """The older batch behind which the batch waits. ``None`` if it does not wait, or if no older batch is worked on:
    then another reason holds up both. Raises BatchError.

    The requests of older batches are claimed first (``BatchStore.claim``), so a batch has no request under way while
    an older batch has enough of them."""
    if batch.status is not BatchStatus.IN_PROGRESS or batch.counts.claimed:
        return None
    older = await store.list_batches(after=batch.id, limit=MAX_OLDER, statuses={BatchStatus.IN_PROGRESS})
    running = [found for found in older if found.counts.claimed]
    return BatchWait(running[-1].id, len(older)) if running else None  # the last one is the oldest


def read_error(content: bytes) -> str:
    """The message of a failed result, safe to print: ``status 400: prompt is too long``. The result has the text of a
    server, which is hostile."""
    line = safe_json.parse_object(content)
    if line is None:
        return UNREADABLE
    if line.get("error"):
        return describe_error(line["error"])
    response = line.get("response")
    if not isinstance(response, dict):
        return UNREADABLE
    status = safe_json.as_count(response.get("status_code"))
    return f"status {status or '?'}: {_describe_body(response.get('body'))}"


def _describe_body(body: Any) -> str:
    """The message in the body of an error response: JSON of any shape, or a text where the server sent no JSON."""
    if isinstance(body, str):
        page = body.encode("utf-8", "replace")
        if is_web_page(page):
            return describe_web_page(page)
    return describe_error(body)
