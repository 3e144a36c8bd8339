"""The knee of a sweep: the load from which on more requests in flight bring no more tokens, but longer waits. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import StageKind

# The knee is the lowest level with at least this share of the highest rate. A smaller difference is noise.
KNEE_RATE_SHARE = 0.95
MORE_WAITING = 1.2  # a TTFT that is so many times as long has grown


@dataclass(frozen=True, slots=True)
class Knee:
    """The knee of a sweep: ``level`` requests in flight, and the figures of that stage.

    ``is_passed``: a higher level was measured too, and gave no more. Otherwise the rate may still grow past the highest
    level. ``goodput_per_s`` is that of the knee's stage; ``best_goodput_level`` is the level with the most goodput.
    ``text`` is the knee in words, ``goodput_text`` its goodput.
    """

    level: int
    tokens_per_s: float
    ttft_p50_ms: float | None
    goodput_per_s: float | None
    best_goodput_level: int | None
    best_goodput_per_s: float | None
    is_passed: bool
    text: str
    goodput_text: str


def find_knee(stages: Sequence[StageResult], objective: Objective) -> Knee | None:
    """Finds the knee of the stages of the mesh, one for each level. ``None`` for fewer than two levels with a rate."""
    by_level = {
        stage.concurrency: stage
        for stage in stages
        if stage.kind is StageKind.MESH and stage.concurrency and stage.rates.best_tokens_per_s
    }
    if len(by_level) < 2:
        return None
    rates = {level: by_level[level].rates.best_tokens_per_s or 0.0 for level in sorted(by_level)}
    highest = max(rates.values())
    level = next(level for level, rate in rates.items() if rate >= KNEE_RATE_SHARE * highest)
    stage = by_level[level]
    goodputs = {level: by_level[level].rates.best_goodput_per_s for level in rates}
    known_goodputs = {level: goodput for level, goodput in goodputs.items() if goodput}
    best_level = max(known_goodputs, key=lambda level: known_goodputs[level]) if known_goodputs else None
    return Knee(
        level=level,
        tokens_per_s=rates[level],
        ttft_p50_ms=stage.latency.ttft.p50,
        goodput_per_s=goodputs[level],
        best_goodput_level=best_level,
        best_goodput_per_s=None if best_level is None else known_goodputs[best_level],
        is_passed=level < max(rates),
        text=f"{_describe_level(stage, rates[level])}; {_describe_beyond(level, by_level)}",
        goodput_text=_describe_goodput(goodputs[level], objective),
    )


def _describe_level(stage: StageResult, tokens_per_s: float) -> str:
    """The knee's figures: ``8 in flight: 745 tok/s, TTFT 59 ms``."""
    ttft_ms = stage.latency.ttft.p50
    ttft_text = "" if ttft_ms is None else f", TTFT {_short(ttft_ms)} ms"
    return f"{stage.concurrency} in flight: {_short(tokens_per_s)} tok/s{ttft_text}"


def _describe_beyond(level: int, by_level: dict[int, StageResult]) -> str:
    """What happens past the knee."""
    beyond = [stage for other, stage in by_level.items() if other > level]
    if not beyond:
        return "that is the highest level, and more may still give more"
    ttft_ms = by_level[level].latency.ttft.p50
    last_ttft_ms = max(beyond, key=lambda stage: stage.concurrency or 0).latency.ttft.p50
    if ttft_ms and last_ttft_ms and last_ttft_ms >= MORE_WAITING * ttft_ms:
        return "past it only waiting grows"
    return "past it nothing grows"


def _describe_goodput(goodput_per_s: float | None, objective: Objective) -> str:
    """The goodput, with its objectives."""
    amount = "unknown" if goodput_per_s is None else f"{_short(goodput_per_s)} req/s"
    return f"goodput {amount} (TTFT ≤ {objective.ttft_ms:g} ms and TPOT ≤ {objective.tpot_ms:g} ms)"


def _short(value: float) -> str:
    """A number with three significant digits, and without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
