"""The part of a stage in which all slots were busy, without the ramp at its start and the tail at its end. Pure.

Only in this part does a rate say what a node or the mesh can do: before it the slots fill, after it they become empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.figures.answers.token_counts import TokenCounts
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.stats import rate

# The first round is left out only if at least this share of the time until the last send is left.
MIN_LOADED_SHARE = 0.4
# Answers that a client sees together for a shorter time may have been written one after the other.
TOGETHER_SHARE = 0.3
# As in the balancer (balancer/limits/parallel_limit.py): a shorter time is no wait for a slot, and no load.
WAIT_NOISE_MS, WAIT_NOISE_SHARE = 50.0, 0.05
LOAD_NOISE_MS = 200.0


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """From when to when all slots were busy, in seconds of the stage."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def find_loaded_part(concurrency: int | None, records: Sequence[LoadSample]) -> LoadedPart | None:
    """Finds the part of a closed loop in which ``concurrency`` requests were in flight at every moment.

    It ends when the last request is sent: until then each answer that ended was followed by another request. It begins
    when each of the first ``concurrency`` requests has ended. All of them are sent at the same moment, so that all
    slots read their prompts at once; only after this first round are they in all phases of an answer. If that leaves
    too little of the stage (fewer than three rounds, or a node that is much slower than the others), the part begins
    with the stage.

    ``None`` for an open loop, and if all requests were sent at once.
    """
    if concurrency is None or len(records) <= concurrency:
        return None
    in_order = sorted(records, key=lambda record: record.sent_s)
    end_s = in_order[-1].sent_s
    start_s = max(record.ended_s for record in in_order[:concurrency])
    if end_s <= 0.0:
        return None
    if end_s - start_s < MIN_LOADED_SHARE * end_s:
        start_s = 0.0
    return LoadedPart(start_s, end_s)


def token_rate(answers: Sequence[Answer], part: LoadedPart | None, token_counts: TokenCounts) -> float | None:
    """The tokens/s that arrived in this part. ``None`` without a part, and if a count of tokens in it is unknown."""
    tokens = None if part is None else token_counts.between(answers, part.start_s, part.end_s)
    return None if part is None or tokens is None else rate(tokens, part.seconds)


def answer_rate(
    answers: Sequence[Answer], part: LoadedPart | None, *, counts: Callable[[Answer], bool | None]
) -> float | None:
    """The served requests per second in this part that ``counts`` accepts. ``None`` without a part, and if ``counts``
    does not know it of one of them.

    A request counts with the share of its answer that arrived in this part. Its end alone would not do: a part has few
    ends, and many of them at the same time.
    """
    if part is None:
        return None
    served = [
        answer for answer in answers if answer.record.outcome is SampleOutcome.SERVED and answer.record.arrivals_s
    ]
    shares = [(_share_in(answer.record, part), counts(answer)) for answer in served]
    if any(share > 0 and is_counted is None for share, is_counted in shares):
        return None
    return rate(math.fsum(share for share, is_counted in shares if is_counted), part.seconds)


def _share_in(record: LoadSample, part: LoadedPart) -> float:
    """The share of an answer's pieces that arrived in this part."""
    inside = sum(part.start_s <= arrival_s < part.end_s for arrival_s in record.arrivals_s)
    return inside / len(record.arrivals_s)


def mean_busy(records: Sequence[LoadSample], part: LoadedPart | None) -> float | None:
    """How many of these requests the server worked on at once, on the mean over this part. ``None`` without a part.

    The server works on a request for its own total time, without the time that the request waited inside it for a slot.
    If the server gives no durations, it is the time from the first piece of the answer to its end.
    """
    if part is None or part.seconds <= 0:
        return None
    overlaps = (min(record.ended_s, part.end_s) - max(_work_began_s(record), part.start_s) for record in records)
    return math.fsum(overlap for overlap in overlaps if overlap > 0) / part.seconds


def _work_began_s(record: LoadSample) -> float:
    """When the server began to work on a request, in seconds of the stage; its end if it never began."""
    counters = record.counters
    if counters is not None and counters.total_ms is not None and counters.waited_ms is not None:
        return max(record.sent_s, record.ended_s - (counters.total_ms - counters.waited_ms) / 1000.0)
    return record.arrivals_s[0] if record.arrivals_s else record.ended_s


def most_at_once(records: Sequence[LoadSample]) -> int:
    """The largest number of answers that were being written at the same time, as the client saw it.

    Answers that come at the same time are the surest sign of how many requests a server runs in parallel. They must do
    so for ``TOGETHER_SHARE`` of a usual answer's time without a pause: if the client runs late, it sees the end of an
    answer after the beginning of the next answer in the same slot. An answer of one piece shows nothing, nor does one
    whose pieces all came in one read, at the same time.
    """
    answers = [record.arrivals_s for record in records if record.arrivals_s]
    streams = [arrivals_s for arrivals_s in answers if arrivals_s[-1] > arrivals_s[0]]
    if not streams:
        return 0
    usual_s = statistics.median(arrivals_s[-1] - arrivals_s[0] for arrivals_s in streams)
    changes = sorted([(arrivals_s[0], +1) for arrivals_s in streams] + [(arrivals_s[-1], -1) for arrivals_s in streams])
    most = 0
    began_s: list[float] = []  # since when at least 1, 2, 3, … answers are written; the last one began last
    for at_s, change in changes:  # at equal times, ends come first
        if change > 0:
            began_s.append(at_s)
        elif at_s - began_s.pop() >= TOGETHER_SHARE * usual_s:
            most = max(most, len(began_s) + 1)
    return most


def count_waited_inside(records: Sequence[LoadSample]) -> int | None:
    """How many requests waited inside the server for a slot. ``None`` if no server gave the durations to tell."""
    known = [record.counters for record in records if record.counters and record.counters.waited_ms is not None]
    return sum(_has_waited(counters) for counters in known) if known else None


def _has_waited(counters: ServerCounters) -> bool:
    """Whether a request waited inside the server for longer than noise would explain."""
    return (counters.waited_ms or 0.0) > max(WAIT_NOISE_MS, WAIT_NOISE_SHARE * (counters.total_ms or 0.0))


def load_seconds(records: Sequence[LoadSample]) -> float:
    """The seconds that these requests waited for their model to be loaded, all together."""
    loads_ms = (record.counters.load_ms or 0.0 for record in records if record.counters is not None)
    return math.fsum(load_ms for load_ms in loads_ms if load_ms > LOAD_NOISE_MS) / 1000.0
