"""All that is known of one batch: `gpumesh batch show`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from gpumesh.batches.progress import BatchProgress
from gpumesh.batches.reasons import BatchWait, SeenErrors
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchStatus
from gpumesh.cli.views.batch.texts import (
    format_done,
    format_left,
    format_name,
    format_rate,
    format_share,
    format_size,
    format_status,
    progress_bar,
    status_mark,
)
from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.figures import format_duration, shorten
from gpumesh.cli.views.pool.plan_view import draw_facts
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.text.quoting import paste_command

LONGEST_BAR = 50
MAX_SHOWN_ERRORS = 10  # wrong lines; the rest is in the JSON
MAX_SHOWN_MESSAGES = 2  # of failed requests; the rest is in the results
MAX_MESSAGE_LENGTH = 160


def print_batch(progress: BatchProgress, now: float) -> None:
    """Prints the view to stdout. ``now``: seconds since 1970."""
    out = console()
    print_plain(out, batch_view(progress, now, out.width))


def batch_view(progress: BatchProgress, now: float, width: int) -> RenderableType:
    """The whole view for a terminal of ``width`` characters."""
    return Group(*_draw_batch(progress, now, width))


def _draw_batch(progress: BatchProgress, now: float, width: int) -> Iterator[RenderableType]:
    batch = progress.batch
    mark, style = status_mark(batch)
    head = Text.assemble((mark, style), " ", (batch.id, "bold"), "  ")
    if batch.new.name:
        head.append(f"{format_name(batch)}  ")
    head.append(format_status(batch.status), style=style)
    since = _status_since(batch)
    if since is not None:
        head.append(f" {'' if batch.status.has_ended else 'for '}{format_duration(now - since)}")
        head.append(" ago" if batch.status.has_ended else "")
    yield head
    if format_share(batch):
        done = f"  {format_share(batch)}  {format_done(batch)}"
        yield Text("  ").append(progress_bar(batch, max(min(LONGEST_BAR, width - len(done) - 3), 8))).append(done)
    yield Text()
    yield draw_facts(list(_list_facts(progress, now)))


def _status_since(batch: Batch) -> float | None:
    """When its status was reached; ``None`` if that is not known."""
    if batch.status.has_ended:
        return batch.ended_at
    if batch.status is BatchStatus.CANCELLING:
        return batch.cancelling_at
    return batch.created_at if batch.status is BatchStatus.VALIDATING else batch.in_progress_at


def _list_facts(progress: BatchProgress, now: float) -> Iterator[tuple[str, str]]:
    batch, counts = progress.batch, progress.batch.counts
    if batch.status is BatchStatus.VALIDATING:
        yield "reads", f"its file; {batch.read_lines:,} lines so far"
    if batch.status is BatchStatus.IN_PROGRESS:
        if progress.wait is not None:
            yield "waits", _describe_wait(progress.wait)
        if progress.wait is None or progress.rate_per_s:
            yield "rate", _describe_rate(progress)
        yield "under way", f"{counts.claimed:,} now; {counts.unfinished - counts.claimed:,} wait"
    if batch.ended_at is not None and batch.status.has_ended:
        yield "took", format_duration(batch.ended_at - batch.created_at)
        if counts.unfinished:
            yield "left", f"{counts.unfinished:,} requests without a result"
    elif batch.expires_at > now:
        yield "window", f"ends in {format_duration(batch.expires_at - now)}"
    else:
        yield "window", "has passed: what has no result by now fails"
    yield "sent to", "the mesh, as prompts" if _is_prompts(batch) else batch.new.endpoint
    if batch.new.owner:
        yield "key", batch.new.owner
    if progress.errors is not None:
        yield from _failure_facts(batch, progress.errors)
    retried_count = counts.failed + counts.unfinished
    if batch.status.has_ended and retried_count:
        yield "retry", f"{paste_command('gpumesh batch retry {ID}', ID=batch.id)} sends {retried_count:,} again"
    if counts.completed + counts.failed:
        command = paste_command("gpumesh batch results {ID}", ID=batch.id)
        yield "results", f"{format_size(batch)}: {command} prints them"
    yield from _error_facts(batch)


def _describe_rate(progress: BatchProgress) -> str:
    if not progress.rate_per_s:
        return "no result in the last minutes; `gpumesh status` shows whether nodes are up"
    left = format_left(progress)
    return f"{format_rate(progress.rate_per_s)}, about {left} left" if left else format_rate(progress.rate_per_s)


def _describe_wait(wait: BatchWait) -> str:
    others = f" and {wait.older_count - 1:,} more" if wait.older_count > 1 else ""
    return f"behind {wait.running_id}{others}; batches run one after the other"


def _failure_facts(batch: Batch, seen: SeenErrors) -> Iterator[tuple[str, str]]:
    """What most of its failed requests have failed with, and how many of them."""
    scope = f" of the first {seen.read_count:,}" if batch.counts.failed > seen.read_count else ""
    shown = seen.errors[:MAX_SHOWN_MESSAGES]
    for error in shown:
        yield "failed", f"{error.count:,}{scope}: {shorten(clean_line(error.message), MAX_MESSAGE_LENGTH)}"
    other_count = seen.read_count - sum(error.count for error in shown)
    if other_count:
        command = paste_command("gpumesh batch results {ID} --failed", ID=batch.id)
        yield "failed", f"{other_count:,}{scope}: other errors; {command} prints all"


def _is_prompts(batch: Batch) -> bool:
    return batch.new.endpoint == PROMPT_ENDPOINT


def _error_facts(batch: Batch) -> Iterator[tuple[str, str]]:
    """The wrong lines of its file."""
    for error in batch.errors[:MAX_SHOWN_ERRORS]:
        yield "wrong", f"line {error.line}: {error.message}" if error.line else error.message
    hidden_count = batch.error_count - min(len(batch.errors), MAX_SHOWN_ERRORS)
    if hidden_count > 0:
        yield "wrong", f"… and {hidden_count:,} more lines"
