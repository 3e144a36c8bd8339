"""Computes the figures of a disturbed stage before, during and after its disturbance. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.answers.answer import Answer
from gpumesh.bench.figures.answers.token_counts import TokenCounts
from gpumesh.bench.load.samples import SampleOutcome, StageRun
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


def phases_of(run: StageRun, answers: Sequence[Answer], token_counts: TokenCounts) -> tuple[Phase, ...]:
    """The three phases of a stage that was disturbed, in the order of time; empty for another stage."""
    if run.disturbed_s is None:
        return ()
    begin_s, end_s = run.disturbed_s
    return (
        _phase("before", answers, token_counts, 0.0, begin_s),
        _phase("during", answers, token_counts, begin_s, end_s),
        _phase("after", answers, token_counts, end_s, run.duration_s),
    )


def _phase(name: str, answers: Sequence[Answer], token_counts: TokenCounts, start_s: float, end_s: float) -> Phase:
    """The figures of the phase from ``start_s`` to ``end_s`` (seconds of the stage)."""
    records = [answer.record for answer in answers if start_s <= answer.record.sent_s < end_s]
    gaps = [gap_ms for record in records for gap_ms in gaps_ms(record.arrivals_s)]
    tokens = token_counts.between(answers, start_s, end_s)
    return Phase(
        name,
        requests=len(records),
        failed=sum(record.outcome in (SampleOutcome.FAILED, SampleOutcome.CUT) for record in records),
        retried=sum(record.attempts > 1 for record in records),
        end_to_end=summarize_sample(record.end_to_end_ms for record in records),
        output_tokens_per_s=None if tokens is None else rate(tokens, end_s - start_s),
        longest_gap_ms=max(gaps, default=None),
    )
