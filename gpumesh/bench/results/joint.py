"""Joins the results of several runs of the same scenario into one result. Pure.

A figure of the joint result is the mean of the runs' figures (``mean_of_runs``), its interval comes from the spread
between the runs. Requests, tokens and failures are counted over all runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from gpumesh.bench.figures.answers.coverage import Coverage
from gpumesh.bench.figures.knee import find_knee
from gpumesh.bench.figures.rate_intervals import RateIntervals
from gpumesh.bench.figures.routes.route_costs import route_costs
from gpumesh.bench.figures.scaling import scaling
from gpumesh.bench.figures.summary import FailureCount, StageResult, stage_label
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Interval, SampleSummary
from gpumesh.bench.student_t import interval_between_runs, mean_of_runs

Record = TypeVar("Record")

# Fields that are counted over all runs. All other numbers are means.
_TOTALS = frozenset(
    {
        "duration_s",
        "ramp_s",
        "loaded_s",
        "tail_s",
        "requests",
        "served",
        "failed",
        "cut",
        "retried",
        "prompt_tokens",
        "output_tokens",
        "unfinished",
        "cold_starts",
        "late_sends",
        "count",
        "samples",
        "energy_j",
        *(field.name for field in dataclasses.fields(Coverage)),
    }
)


def join_runs(runs: Sequence[BenchResult]) -> BenchResult:
    """Joins the results of runs of the same scenario, in the order in which they were run.

    A stage that some runs lack is joined from the others. Stages of the same name with another number of requests in
    flight (each run finds the capacity of the nodes anew) are not joined. The result of a single run is returned as it
    is. Raises ``ValueError`` if there is no run.
    """
    if not runs:
        raise ValueError("no run to join")
    if len(runs) == 1:
        return runs[0]
    stages: dict[tuple[str, int | None, int], list[StageResult]] = {}
    for run in runs:
        labels: Counter[str] = Counter()  # a stage that was measured again has the same label
        for stage in run.stages:
            label = stage_label(stage)
            stages.setdefault((label, stage.concurrency, labels[label]), []).append(stage)
            labels[label] += 1
    joint_stages = tuple(_join_stage(same) for same in stages.values())
    first = runs[0]
    return replace(
        first,
        stages=joint_stages,
        scaling=None if first.scaling is None else scaling(joint_stages),
        routes=route_costs(joint_stages),
        route_differences=_join_rows([run.route_differences for run in runs]),
        costs=_join_rows([run.costs for run in runs]),
        knee=None if first.knee is None else find_knee(joint_stages, first.objective),
        notes=_join_notes(runs),
        partial=any(run.partial for run in runs),
        partial_reason=next((run.partial_reason for run in runs if run.partial_reason is not None), None),
        runs=tuple(runs),
        cold_starts=tuple(start for run in runs for start in run.cold_starts),
    )


def _join_notes(runs: Sequence[BenchResult]) -> tuple[str, ...]:
    """The notes of all runs, each once; with the number of the runs that have it, if not all have it."""
    counts = Counter(note for run in runs for note in run.notes)
    return tuple(
        note if count == len(runs) else f"{note} (in {count} of {len(runs)} runs)" for note, count in counts.items()
    )


def _join_stage(runs: Sequence[StageResult]) -> StageResult:
    """Joins the results of one stage in several runs. A stage that only one run has stays as it is."""
    if len(runs) == 1:
        return runs[0]
    joint: StageResult = _join_records(runs)
    return replace(joint, intervals=_join_intervals(runs), failures=_join_failures(runs))


def _join_records(records: Sequence[Record]) -> Record:
    """Joins records of the same dataclass, field by field."""
    first: Any = records[0]
    fields = {
        field.name: _join_values(field.name, [getattr(record, field.name) for record in records])
        for field in dataclasses.fields(first)
    }
    joint: Record = replace(first, **fields)
    return joint


def _join_values(name: str, values: Sequence[Any]) -> Any:
    """Joins the values of the field ``name`` in several runs. Values that are unknown (``None``) are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    first = known[0]
    if name in _TOTALS:  # a sum without one of its parts is not the sum
        return sum(known) if len(known) == len(values) else None
    if isinstance(first, SampleSummary):
        return _join_samples(known)
    if dataclasses.is_dataclass(first):
        return _join_records(known)
    if isinstance(first, tuple) and first and dataclasses.is_dataclass(first[0]):
        return _join_rows(known)
    if isinstance(first, bool):
        return any(known)
    if isinstance(first, float):
        return mean_of_runs(known)
    if isinstance(first, int) and len(set(known)) > 1:
        return round(math.fsum(known) / len(known))
    return first  # a text or a kind, which is the same in all runs


def _join_rows(tables: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Joins tables of records (the shares of the nodes, the phases): rows with equal names belong together.

    A table whose rows have no names is that of the first run.
    """
    rows: dict[tuple[str, ...], list[Any]] = {}
    for table in tables:
        for row in table:
            values = [getattr(row, field.name) for field in dataclasses.fields(row)]
            names = tuple(value for value in values if isinstance(value, str))
            if not names:
                return tables[0]
            rows.setdefault(names, []).append(row)
    return tuple(_join_records(same) for same in rows.values())


def _join_samples(samples: Sequence[SampleSummary]) -> SampleSummary:
    """Joins the summaries of a sample in several runs. The percentiles are means, and so is the mean.

    The interval of the median is that between the runs.
    """

    def known(name: str) -> list[float]:
        return [value for value in (getattr(sample, name) for sample in samples) if value is not None]

    interval = interval_between_runs(known("p50"))
    return SampleSummary(
        n=sum(sample.n for sample in samples),
        mean=mean_of_runs(known("mean")),
        min=min(known("min"), default=None),
        max=max(known("max"), default=None),
        p50=mean_of_runs(known("p50")),
        p90=mean_of_runs(known("p90")),
        p99=mean_of_runs(known("p99")),
        p50_low=None if interval is None else interval.low,
        p50_high=None if interval is None else interval.high,
    )


def _join_intervals(runs: Sequence[StageResult]) -> RateIntervals:
    """The intervals of the rates between the runs."""

    def interval(values: Iterable[float | None]) -> Interval | None:
        return interval_between_runs([value for value in values if value is not None])

    names = [field.name for field in dataclasses.fields(RateIntervals) if field.name != "tokens_per_joule"]
    rates = {name: interval(getattr(run.rates, name) for run in runs) for name in names}  # they have the names of rates
    return RateIntervals(**rates, tokens_per_joule=interval(run.tokens_per_joule for run in runs))


def _join_failures(runs: Sequence[StageResult]) -> tuple[FailureCount, ...]:
    """The reasons of failures in all runs, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for run in runs:
        for failure in run.failures:
            counts[failure.code, failure.message] += failure.count
    return tuple(FailureCount(code, message, count) for (code, message), count in counts.most_common())
