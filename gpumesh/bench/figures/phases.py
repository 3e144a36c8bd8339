"""Computes the figures of a disturbed stage before, during and after its disturbance. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.loaded_part import tokens_between
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.stats import SampleSummary, gaps_ms, rate, summarize_sample


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage that was disturbed: ``before``, ``during`` or ``after`` the disturbance.

    A request belongs to the phase in which it was sent, a token to the phase in which it arrived. ``failed`` includes
    the requests whose answer was cut. ``longest_gap_ms``: the longest time between two pieces of one answer.
    """

    name: str
    requests: int
    failed: int
    retried: int
    end_to_end: SampleSummary
    output_tokens_per_s: float | None = None
    longest_gap_ms: float | None = None


def phases_of(run: StageRun, records: Sequence[LoadSample]) -> tuple[Phase, ...]:
    """The three phases of a stage that was disturbed, in the order of time; empty for another stage."""
    if run.disturbed_s is None:
        return ()
    begin_s, end_s = run.disturbed_s
    return (
        _phase("before", records, 0.0, begin_s),
        _phase("during", records, begin_s, end_s),
        _phase("after", records, end_s, run.duration_s),
    )


def _phase(name: str, records: Sequence[LoadSample], start_s: float, end_s: float) -> Phase:
    """The figures of the phase from ``start_s`` to ``end_s`` (seconds of the stage)."""
    phase_records = [record for record in records if start_s <= record.sent_s < end_s]
    gaps = [gap_ms for record in phase_records for gap_ms in gaps_ms(record.arrivals_s)]
    return Phase(
        name,
        requests=len(phase_records),
        failed=sum(record.outcome in (SampleOutcome.FAILED, SampleOutcome.CUT) for record in phase_records),
        retried=sum(record.attempts > 1 for record in phase_records),
        end_to_end=summarize_sample(record.end_to_end_ms for record in phase_records),
        output_tokens_per_s=rate(tokens_between(records, start_s, end_s), end_s - start_s),
        longest_gap_ms=max(gaps, default=None),
    )
