"""The confidence intervals of a stage's rates, from its answers: the method of batch means. Pure.

A rate is one value of a whole stage. Its requests depend on each other (they share slots and stalls), so they cannot
count as independent values. The method cuts the stage into batches of consecutive answers, which are so long that they
hardly depend on each other, and takes the spread between batches (Schmeiser, "Batch size effects in the analysis of
simulation output", Operations Research 30, 1982; Law, "Simulation Modeling and Analysis", 9.5.3). The batches have
unequal times, so the error is that of a ratio estimator (Cochran, "Sampling Techniques", 1977, 6.4).

Such an interval knows how much a rate changes within a run. It cannot know how much it differs from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.figures.answers.token_counts import TokenCounts
from gpumesh.bench.figures.loaded_part import LoadedPart, find_loaded_part
from gpumesh.bench.figures.rates import Rates, meets_objective
from gpumesh.bench.load.samples import SampleOutcome
from gpumesh.bench.stats import Interval, Objective
from gpumesh.bench.student_t import critical_value

# Schmeiser: more than 30 batches gain nothing, and fewer long ones depend less on each other.
MAX_BATCHES = 20
MIN_BATCHES = 3
LONG_STAGE_ROUNDS = 10  # from so many rounds on, a batch has two of them: neighbours share less then


@dataclass(frozen=True, slots=True)
class RateIntervals:
    """The 95 % confidence intervals of a stage's rates. ``None``: the rate is unknown or 0, or has too few batches.

    That of the tokens per joule takes the power as constant during the stage.
    """

    output_tokens_per_s: Interval | None = None
    total_tokens_per_s: Interval | None = None
    requests_per_s: Interval | None = None
    goodput_per_s: Interval | None = None
    loaded_tokens_per_s: Interval | None = None
    loaded_requests_per_s: Interval | None = None
    loaded_goodput_per_s: Interval | None = None
    tokens_per_joule: Interval | None = None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Consecutive answers, and the time in seconds that they took together."""

    answers: tuple[Answer, ...]
    seconds: float


def rate_intervals(
    answers: Sequence[Answer],
    concurrency: int | None,
    rates: Rates,
    tokens_per_joule: float | None,
    objective: Objective,
    token_counts: TokenCounts,
) -> RateIntervals:
    """Computes the intervals around the rates of a stage, or of a route, that has these answers.

    ``concurrency`` is ``None`` for an open loop. ``objective`` is that of goodput. A rate of which a count is unknown
    is unknown itself, and has no interval.
    """
    batches = _make_batches(answers, concurrency)

    def output_tokens(answer: Answer) -> float:
        return token_counts.tokens_of(answer) or 0.0

    def all_tokens(answer: Answer) -> float:
        return output_tokens(answer) + (answer.counters.prompt_tokens or 0)

    def is_good(answer: Answer) -> bool:
        return bool(meets_objective(answer, objective))

    return RateIntervals(
        output_tokens_per_s=_interval(rates.output_tokens_per_s, batches, output_tokens),
        total_tokens_per_s=_interval(rates.total_tokens_per_s, batches, all_tokens),
        requests_per_s=_interval(rates.requests_per_s, batches, _is_served),
        goodput_per_s=_interval(rates.goodput_per_s, batches, is_good),
        loaded_tokens_per_s=_interval(rates.loaded_tokens_per_s, batches, output_tokens),
        loaded_requests_per_s=_interval(rates.loaded_requests_per_s, batches, _is_served),
        loaded_goodput_per_s=_interval(rates.loaded_goodput_per_s, batches, is_good),
        tokens_per_joule=_interval(tokens_per_joule, batches, output_tokens),
    )


def _is_served(answer: Answer) -> bool:
    return answer.record.outcome is SampleOutcome.SERVED


def _interval(rate: float | None, batches: Sequence[_Batch], amount: Callable[[Answer], float]) -> Interval | None:
    """The interval around a rate to which each answer adds its ``amount``. ``None``: see ``RateIntervals``."""
    amounts = [math.fsum(amount(answer) for answer in batch.answers) for batch in batches]
    if not rate or len(batches) < MIN_BATCHES or sum(amounts) <= 0:
        return None
    error = _relative_error(amounts, [batch.seconds for batch in batches])
    width = rate * error * critical_value(0.05, len(batches) - 1)
    return Interval(max(rate - width, 0.0), rate + width, len(batches))


def _relative_error(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """The standard error of the rate ``sum(amounts) ÷ sum(seconds)``, as a share of this rate (Cochran, 6.4)."""
    total = math.fsum(amounts)
    overall = total / math.fsum(seconds)
    squares = math.fsum((amount - overall * time_s) ** 2 for amount, time_s in zip(amounts, seconds, strict=True))
    count = len(amounts)
    return math.sqrt(squares * count / (count - 1)) / total


def _make_batches(answers: Sequence[Answer], concurrency: int | None) -> list[_Batch]:
    """Cuts a stage into batches of equally many consecutive answers; a rest at the end is left out.

    In a closed loop a batch has one round or more (as many answers as there are slots), and only the part in which all
    slots were busy is cut.
    """
    routes = {answer.record.route for answer in answers} - {None}
    if routes:  # several routes take turns: the time of a route is that of its own requests
        return [
            _Batch((answer,), answer.record.ended_s - answer.record.sent_s)
            for answer in answers
            if answer.record.ended_s > answer.record.sent_s
        ]
    part = find_loaded_part(concurrency, [answer.record for answer in answers])
    if part is None:
        if concurrency is not None:
            return []
        part = LoadedPart(0.0, math.inf)  # of an open loop, all is cut
    in_order = sorted(answers, key=lambda answer: answer.record.ended_s)
    ordered = [answer for answer in in_order if part.start_s < answer.record.ended_s <= part.end_s]
    size = _batch_size(len(ordered), concurrency or 1)
    batches: list[_Batch] = []
    start_s = part.start_s
    for first in range(0, len(ordered) - size + 1, size):
        batch = tuple(ordered[first : first + size])
        end_s = batch[-1].record.ended_s
        if end_s > start_s:
            batches.append(_Batch(batch, end_s - start_s))
        start_s = end_s
    return batches


def _batch_size(count: int, slots: int) -> int:
    """The number of answers in a batch, a multiple of ``slots``, for a stage with ``count`` answers."""
    rounds = count // slots
    is_long = slots > 1 and rounds >= LONG_STAGE_ROUNDS  # with one slot, the batches do not overlap
    rounds_per_batch = max(math.ceil(rounds / MAX_BATCHES), 2 if is_long else 1)
    return rounds_per_batch * slots
