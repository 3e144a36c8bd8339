"""Sentences about what a command has done with a batch. Pure. Names may come from clients: the caller cleans them."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchStatus
from gpumesh.cli.views.batch.texts import format_status
from gpumesh.config.value_parsers import format_duration
from gpumesh.text.quoting import paste_command


def describe_submission(batch: Batch) -> str:
    """What was submitted, and how to look at it."""
    noun = "prompt" if batch.new.endpoint == PROMPT_ENDPOINT else "request"
    text = f"{_count(batch.counts.total, noun)}, to be answered within {format_duration(batch.new.window_s)}"
    if batch.error_count:
        text += f"; {_count(batch.error_count, 'wrong line')} left out"
    return f"{text}: {paste_command('gpumesh batch show {ID} --watch', ID=batch.id)} shows how far they are"


def describe_results(batch: Batch, out: str | None, *, written: int, failed: int, only_failed: bool) -> Iterator[str]:
    """What was written to ``out``, and what was not: ``written`` results, of which ``failed`` have failed."""
    counts = batch.counts
    if out is not None:
        yield f"{_count(written, 'failed result' if only_failed else 'result')} written to {out}"
    elif not written:
        yield f"{batch.id} has no {'failed ' if only_failed else ''}results{'' if batch.status.has_ended else ' yet'}"
    if counts.unfinished:
        missing = f"{counts.unfinished:,} of {counts.total:,} have no result{'' if batch.status.has_ended else ' yet'}"
        yield f"{batch.id} is {format_status(batch.status)}: {missing}"
    if failed and not only_failed:
        again = f"; {paste_command('gpumesh batch retry {ID}', ID=batch.id)} sends what has failed again"
        yield f"{_count(failed, 'request')} failed{again if batch.status.has_ended else ''}"


def describe_retry(before: Batch, after: Batch) -> str:
    """How many requests are sent again."""
    count = before.counts.failed + before.counts.unfinished
    if not count:
        return f"{before.id}: nothing to send again, each request is answered"
    return f"{after.id}: {count:,} of {after.counts.total:,} requests to be sent again"


def describe_cancel(before: Batch, after: Batch) -> str:
    """What has become of it."""
    if after.status is BatchStatus.CANCELLING:
        return f"{after.id} is being cancelled: {_count(after.counts.claimed, 'request')} under way to be ended"
    if before.status is BatchStatus.CANCELLED:
        return f"{after.id} is cancelled already"
    done = after.counts.completed + after.counts.failed
    return f"{after.id} is cancelled: {done:,} of {after.counts.total:,} requests have a result"


def describe_removal(before: Batch, _after: Batch) -> str:
    return f"{before.id} is removed"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
