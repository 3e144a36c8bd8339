"""Compares two benchmark results: which figures became better or worse, and which differences are only noise. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.results.result import BenchResult, Environment
from gpumesh.bench.stats import SampleSummary, ratio

# The rate of a whole stage is a single value, so its noise is unknown. A change of less than 5 % counts as noise.
NOISE_RATIO = 0.05
# A smaller change of a median counts as no change, however narrow its confidence interval is.
MIN_MEDIAN_CHANGE = 0.01


class DifferenceVerdict(StrEnum):
    """How a figure of result B differs from that of result A."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    """These samples show no difference."""
    UNKNOWN = "unknown"
    """There are too few samples to tell."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one stage in both results, A and B. ``ratio`` is B ÷ A; ``verdict`` tells how B differs from A."""

    stage: str
    figure: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    verdict: DifferenceVerdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two results, A and B.

    ``caveats`` are sentences about differences between the runs that may explain the differences between the figures.
    ``only_a`` and ``only_b`` are the labels of the stages that the other result does not have.
    """

    differences: tuple[Difference, ...]
    caveats: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


# The compared figures. In both tables: its name, its unit, whether more is better, and how to take it from a stage.
_SAMPLE_FIGURES: tuple[tuple[str, str, bool, Callable[[StageResult], SampleSummary]], ...] = (
    ("ttft p50", "ms", False, lambda stage: stage.latency.ttft),
    ("tpot p50", "ms", False, lambda stage: stage.latency.tpot),
    ("end-to-end p50", "ms", False, lambda stage: stage.latency.end_to_end),
    ("server tokens/s p50", "tok/s", True, lambda stage: stage.rates.server),
)
_RATE_FIGURES: tuple[tuple[str, str, bool, Callable[[StageResult], float | None]], ...] = (
    ("output tokens/s", "tok/s", True, lambda stage: stage.rates.output_tokens_per_s),
    ("requests/s", "req/s", True, lambda stage: stage.rates.requests_per_s),
    ("goodput", "req/s", True, lambda stage: stage.rates.goodput_per_s),
    ("tokens/J", "tok/J", True, lambda stage: stage.tokens_per_joule),
)


def compare(a: BenchResult, b: BenchResult) -> Comparison:
    """Compares result B with result A: the figures of all stages that both results have, by the stage's label."""
    stages_a, stages_b = _stages_by_label(a), _stages_by_label(b)
    differences: list[Difference] = []
    for label, stage_a in stages_a.items():
        if label in stages_b:
            differences.extend(_compare_stages(label, stage_a, stages_b[label]))
    return Comparison(
        differences=tuple(differences),
        caveats=tuple(_find_caveats(a, b)),
        only_a=tuple(label for label in stages_a if label not in stages_b),
        only_b=tuple(label for label in stages_b if label not in stages_a),
    )


def _stages_by_label(result: BenchResult) -> dict[str, StageResult]:
    return {stage_label(stage): stage for stage in result.stages}


def _compare_stages(label: str, a: StageResult, b: StageResult) -> Iterator[Difference]:
    """Compares the figures of one stage in both results. A figure that both results lack is left out.

    The share of failures is left out if no request has failed in either result.
    """
    for figure, unit, more_is_better, sample_of in _SAMPLE_FIGURES:
        sample_a, sample_b = sample_of(a), sample_of(b)
        if sample_a.n or sample_b.n:
            verdict = _judge_samples(sample_a, sample_b, more_is_better=more_is_better)
            yield _make_difference(label, figure, unit, sample_a.p50, sample_b.p50, verdict)
    for figure, unit, more_is_better, rate_of in _RATE_FIGURES:
        rate_a, rate_b = rate_of(a), rate_of(b)
        if rate_a is not None or rate_b is not None:
            verdict = _judge_rates(rate_a, rate_b, more_is_better=more_is_better)
            yield _make_difference(label, figure, unit, rate_a, rate_b, verdict)
    any_failed = a.failed + a.cut + b.failed + b.cut > 0
    if any_failed:
        share_a, share_b = _failed_share(a), _failed_share(b)
        yield _make_difference(label, "failed share", "", share_a, share_b, _judge_failed_shares(share_a, share_b))


def _failed_share(stage: StageResult) -> float:
    """The share of requests that failed or whose answer was cut, from 0 to 1; 0 for a stage without requests."""
    return (stage.failed + stage.cut) / max(stage.requests, 1)


def _judge_failed_shares(a: float, b: float) -> DifferenceVerdict:
    """Judges B against A: any change counts, because a failed request is not noise."""
    if a == b:
        return DifferenceVerdict.SAME
    return DifferenceVerdict.WORSE if b > a else DifferenceVerdict.BETTER


def _make_difference(
    stage: str, figure: str, unit: str, a: float | None, b: float | None, verdict: DifferenceVerdict
) -> Difference:
    """Makes the difference between the values ``a`` and ``b`` of a figure, with their ratio."""
    return Difference(stage, figure, unit, a, b, ratio(b, a), verdict)


def _judge_samples(a: SampleSummary, b: SampleSummary, *, more_is_better: bool) -> DifferenceVerdict:
    """Judges the median of B against that of A: they differ if their 95 % confidence intervals do not touch.

    This is a cautious criterion: some real differences count as none. ``UNKNOWN`` if a sample is too small for an
    interval. A change of less than ``MIN_MEDIAN_CHANGE`` is no difference.
    """
    if a.p50_low is None or a.p50_high is None or b.p50_low is None or b.p50_high is None:
        return DifferenceVerdict.UNKNOWN
    # A median of 0 has no useful ratio: then only the intervals decide.
    if a.p50 and b.p50 and abs(b.p50 / a.p50 - 1.0) < MIN_MEDIAN_CHANGE:
        return DifferenceVerdict.SAME
    if b.p50_low > a.p50_high:  # all of B's interval is above A's
        return DifferenceVerdict.BETTER if more_is_better else DifferenceVerdict.WORSE
    if b.p50_high < a.p50_low:  # all of B's interval is below A's
        return DifferenceVerdict.WORSE if more_is_better else DifferenceVerdict.BETTER
    return DifferenceVerdict.SAME


def _judge_rates(a: float | None, b: float | None, *, more_is_better: bool) -> DifferenceVerdict:
    """Judges the rate of B against that of A. A change of less than ``NOISE_RATIO`` is no difference.

    ``UNKNOWN`` if a rate is unknown, or if that of A is 0: then there is no ratio.
    """
    if a is None or b is None or a <= 0:
        return DifferenceVerdict.UNKNOWN
    if abs(b / a - 1.0) < NOISE_RATIO:
        return DifferenceVerdict.SAME
    is_better = b > a if more_is_better else b < a
    return DifferenceVerdict.BETTER if is_better else DifferenceVerdict.WORSE


def _find_caveats(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Yields sentences about differences between the runs that may explain differences between the figures."""
    if a.scenario is not b.scenario:
        yield f"the scenarios differ: {a.scenario} and {b.scenario}"
    for name in ("model", "tokens", "prompt_tokens", "think", "seed", "speed"):
        value_a, value_b = getattr(a.settings, name), getattr(b.settings, name)
        if value_a != value_b:
            yield f"not the same {name.replace('_', ' ')}: {value_a} and {value_b}"
    if a.simulated != b.simulated:
        yield "one of the two was measured on simulated hosts"
    if a.environment.platform != b.environment.platform or a.environment.cpus != b.environment.cpus:
        yield f"measured from different machines: {a.environment.platform} and {b.environment.platform}"
    nodes_a, nodes_b = _compared_properties(a.environment), _compared_properties(b.environment)
    for name, properties_a in nodes_a.items():
        if name in nodes_b and nodes_b[name] != properties_a:
            yield f"node {name} is not the same: its GPUs, server or transport changed"
    for label, nodes, other_nodes in (("A", nodes_a, nodes_b), ("B", nodes_b, nodes_a)):
        for name in nodes:
            if name not in other_nodes:
                yield f"node {name} is only in {label}"
    for label, result in (("A", a), ("B", b)):
        if any(stage.client.bound for stage in result.stages):
            yield f"{label} was bound by the client in some stage (see its notes)"


def _compared_properties(environment: Environment) -> dict[str, tuple[object, ...]]:
    """The properties of each node, by its name, that must be equal in both runs. Measured values are not among them."""
    return {node.name: (node.gpus, node.backend, node.version, node.transport) for node in environment.nodes}
