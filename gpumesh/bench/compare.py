"""Two results beside each other: what became better, what worse, and what is only noise. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from gpumesh.bench.result import BenchResult
from gpumesh.bench.stats import SampleSummary
from gpumesh.bench.summary import StageResult

# A rate of a whole stage has no spread of its own: less than this between two runs is taken for noise.
NOISE_RATIO = 0.05
# And of medians, however sure they are, a difference that nobody would notice.
MIN_MEDIAN_CHANGE = 0.01


class DifferenceVerdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    """No difference that these samples can show."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one stage in both. ``ratio`` is B ÷ A."""

    stage: str
    figure: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    verdict: DifferenceVerdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """``caveats`` say in what else the two runs differ; ``only_a`` and ``only_b`` are stages without a counterpart."""

    differences: tuple[Difference, ...]
    caveats: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


_SPREADS: tuple[tuple[str, str, bool, Callable[[StageResult], SampleSummary]], ...] = (
    ("ttft p50", "ms", False, lambda stage: stage.latency.ttft),
    ("tpot p50", "ms", False, lambda stage: stage.latency.tpot),
    ("end-to-end p50", "ms", False, lambda stage: stage.latency.end_to_end),
    ("server tokens/s p50", "tok/s", True, lambda stage: stage.rates.server),
)
_RATES: tuple[tuple[str, str, bool, Callable[[StageResult], float | None]], ...] = (
    ("output tokens/s", "tok/s", True, lambda stage: stage.rates.output_tokens_per_s),
    ("requests/s", "req/s", True, lambda stage: stage.rates.requests_per_s),
    ("goodput", "req/s", True, lambda stage: stage.rates.goodput_per_s),
    ("tokens/J", "tok/J", True, lambda stage: stage.tokens_per_joule),
)


def compare(a: BenchResult, b: BenchResult) -> Comparison:
    stages_a, stages_b = _by_name(a), _by_name(b)
    differences = [
        difference
        for name in stages_a
        if name in stages_b
        for difference in _differences(name, stages_a[name], stages_b[name])
    ]
    return Comparison(
        tuple(differences),
        tuple(_caveats(a, b)),
        tuple(name for name in stages_a if name not in stages_b),
        tuple(name for name in stages_b if name not in stages_a),
    )


def stage_label(stage: StageResult) -> str:
    return stage.name if stage.route is None else f"{stage.name} via {stage.route}"


def _by_name(result: BenchResult) -> dict[str, StageResult]:
    return {stage_label(stage): stage for stage in result.stages}


def _differences(name: str, a: StageResult, b: StageResult) -> Iterator[Difference]:
    for figure, unit, more_is_better, spread_of in _SPREADS:
        left, right = spread_of(a), spread_of(b)
        if left.n or right.n:
            verdict = _verdict_of_spreads(left, right, more_is_better=more_is_better)
            yield _difference(name, figure, unit, (left.p50, right.p50), verdict)
    for figure, unit, more_is_better, rate_of in _RATES:
        one, other = rate_of(a), rate_of(b)
        if one is not None or other is not None:
            yield _difference(name, figure, unit, (one, other), _verdict(one, other, more_is_better=more_is_better))
    if a.failed + a.cut + b.failed + b.cut:
        one, other = (a.failed + a.cut) / max(a.requests, 1), (b.failed + b.cut) / max(b.requests, 1)
        verdict = (
            DifferenceVerdict.SAME
            if one == other
            else DifferenceVerdict.WORSE
            if other > one
            else DifferenceVerdict.BETTER
        )
        yield _difference(name, "failed share", "", (one, other), verdict)


def _difference(
    stage: str, figure: str, unit: str, values: tuple[float | None, float | None], verdict: DifferenceVerdict
) -> Difference:
    a, b = values
    return Difference(stage, figure, unit, a, b, b / a if a and b is not None else None, verdict)


def _verdict_of_spreads(a: SampleSummary, b: SampleSummary, *, more_is_better: bool) -> DifferenceVerdict:
    """Medians differ when their 95 % confidence intervals do not touch: careful rather than keen."""
    if a.p50_low is None or a.p50_high is None or b.p50_low is None or b.p50_high is None:
        return DifferenceVerdict.UNKNOWN
    if a.p50 and b.p50 and abs(b.p50 / a.p50 - 1.0) < MIN_MEDIAN_CHANGE:
        return DifferenceVerdict.SAME
    if b.p50_low > a.p50_high:
        return DifferenceVerdict.BETTER if more_is_better else DifferenceVerdict.WORSE
    if b.p50_high < a.p50_low:
        return DifferenceVerdict.WORSE if more_is_better else DifferenceVerdict.BETTER
    return DifferenceVerdict.SAME


def _verdict(a: float | None, b: float | None, *, more_is_better: bool) -> DifferenceVerdict:
    if a is None or b is None or a <= 0:
        return DifferenceVerdict.UNKNOWN
    if abs(b / a - 1.0) < NOISE_RATIO:
        return DifferenceVerdict.SAME
    return DifferenceVerdict.BETTER if (b > a) == more_is_better else DifferenceVerdict.WORSE


def _caveats(a: BenchResult, b: BenchResult) -> Iterator[str]:
    """Whatever differs beside what was to be compared."""
    if a.scenario is not b.scenario:
        yield f"the scenarios differ: {a.scenario} and {b.scenario}"
    for name in ("model", "tokens", "prompt_tokens", "think", "seed", "speed"):
        one, other = getattr(a.settings, name), getattr(b.settings, name)
        if one != other:
            yield f"not the same {name.replace('_', ' ')}: {one} and {other}"
    if a.simulated != b.simulated:
        yield "one of the two was measured on simulated hosts"
    if a.environment.platform != b.environment.platform or a.environment.cpus != b.environment.cpus:
        yield f"measured from different machines: {a.environment.platform} and {b.environment.platform}"
    nodes_a = {node.name: (node.gpus, node.backend, node.version, node.transport) for node in a.environment.nodes}
    nodes_b = {node.name: (node.gpus, node.backend, node.version, node.transport) for node in b.environment.nodes}
    for name in nodes_a.keys() & nodes_b.keys():
        if nodes_a[name] != nodes_b[name]:
            yield f"node {name} is not the same: its GPUs, server or transport changed"
    for label, result in (("A", a), ("B", b)):
        if any(stage.client.bound for stage in result.stages):
            yield f"{label} was bound by the client in some stage (see its notes)"
