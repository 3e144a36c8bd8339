"""The figures that a comparison looks at, and how each is measured in a stage that was run once or several times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpumesh.bench.comparison.estimates import Measurement, median_error, rate_error
from gpumesh.bench.comparison.outliers import find_outlier
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.stats import Interval, SampleSummary


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """A figure of a stage. ``value`` takes it from a stage; ``error`` is its error within a run, as in ``Measurement``.

    ``repeated_only``: it is compared only between results of several runs, as one run does not tell its uncertainty.
    """

    name: str
    unit: str
    more_is_better: bool
    value: Callable[[StageResult], float | None]
    error: Callable[[StageResult], tuple[float | None, float]]
    repeated_only: bool = False

    def measure(self, runs: Sequence[StageResult]) -> Measurement:
        """The figure in the runs of a stage, without the runs that do not have it, and without an outlier."""
        known = [(number, value) for number, run in enumerate(runs, start=1) if (value := self.value(run)) is not None]
        outlier = find_outlier([value for _, value in known])
        left_out = None if outlier is None else known.pop(outlier)[0]
        error, df = self.error(runs[0]) if len(runs) == 1 else (None, float("inf"))
        return Measurement(tuple(value for _, value in known), error, df, left_out)


def _median(
    name: str, unit: str, sample: Callable[[StageResult], SampleSummary], *, more_is_better: bool = False
) -> ComparedFigure:
    """The median of a sample of each request's values."""
    return ComparedFigure(
        name,
        unit,
        more_is_better,
        value=lambda stage: sample(stage).p50,
        error=lambda stage: median_error(sample(stage)),
    )


def _rate(
    name: str,
    unit: str,
    value: Callable[[StageResult], float | None],
    interval: Callable[[StageResult], Interval | None],
) -> ComparedFigure:
    """A rate of the whole stage."""
    return ComparedFigure(
        name, unit, more_is_better=True, value=value, error=lambda stage: rate_error(value(stage), interval(stage))
    )


def _tail(name: str, sample: Callable[[StageResult], SampleSummary]) -> ComparedFigure:
    """The 90th percentile of a latency."""
    return ComparedFigure(
        name,
        "ms",
        more_is_better=False,
        value=lambda stage: sample(stage).p90,
        error=lambda _stage: (None, float("inf")),
        repeated_only=True,
    )


_LATENCIES: tuple[ComparedFigure, ...] = (
    _median("ttft p50", "ms", lambda stage: stage.latency.ttft),
    _tail("ttft p90", lambda stage: stage.latency.ttft),
    _median("tpot p50", "ms", lambda stage: stage.latency.tpot),
    _median("end-to-end p50", "ms", lambda stage: stage.latency.end_to_end),
    _tail("end-to-end p90", lambda stage: stage.latency.end_to_end),
    _median("server tokens/s p50", "tok/s", lambda stage: stage.rates.server, more_is_better=True),
)
# The rates while all slots were busy say what was measured. Those of the whole stage stand in for them where they are
# unknown: in an open loop, and if there were few requests.
_LOADED_RATES = (
    _rate(
        "tokens/s",
        "tok/s",
        lambda stage: stage.rates.loaded_tokens_per_s,
        lambda stage: stage.intervals.loaded_tokens_per_s,
    ),
    _rate(
        "requests/s",
        "req/s",
        lambda stage: stage.rates.loaded_requests_per_s,
        lambda stage: stage.intervals.loaded_requests_per_s,
    ),
    _rate(
        "goodput",
        "req/s",
        lambda stage: stage.rates.loaded_goodput_per_s,
        lambda stage: stage.intervals.loaded_goodput_per_s,
    ),
)
_WHOLE_RATES = (
    _rate(
        "tokens/s",
        "tok/s",
        lambda stage: stage.rates.output_tokens_per_s,
        lambda stage: stage.intervals.output_tokens_per_s,
    ),
    _rate(
        "requests/s", "req/s", lambda stage: stage.rates.requests_per_s, lambda stage: stage.intervals.requests_per_s
    ),
    _rate("goodput", "req/s", lambda stage: stage.rates.goodput_per_s, lambda stage: stage.intervals.goodput_per_s),
)
_TOKENS_PER_JOULE = _rate(
    "tokens/J", "tok/J", lambda stage: stage.tokens_per_joule, lambda stage: stage.intervals.tokens_per_joule
)


def figures_to_compare(runs_a: Sequence[StageResult], runs_b: Sequence[StageResult]) -> Iterator[ComparedFigure]:
    """The figures that are compared of a stage that was run so in both results, in the order of the table."""
    are_repeated = len(runs_a) > 1 and len(runs_b) > 1
    for figure in _LATENCIES:
        if are_repeated or not figure.repeated_only:
            yield figure
    have_loaded_rates = all(stage.rates.loaded_tokens_per_s is not None for stage in (*runs_a, *runs_b))
    yield from _LOADED_RATES if have_loaded_rates else _WHOLE_RATES
    yield _TOKENS_PER_JOULE
