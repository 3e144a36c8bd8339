"""The sentence about what tokens cost, in energy and in money. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.bench.figures.cost import StageCost
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult


def cost_sentence(result: BenchResult, preferred: Sequence[StageResult]) -> str:
    """What a million output tokens cost at the load at which they are cheapest, and the tokens for a joule.

    ``preferred`` are the stages among which to look; if there are none, all stages.
    """
    stages = {stage_label(stage): stage for stage in preferred or result.stages}
    costs = [cost for cost in result.costs if cost.stage in stages and cost.total_eur is not None]
    if costs:
        # Costs with the same known parts can be compared: so those with the most known parts come first.
        cheapest = min(costs, key=lambda cost: (cost.unknown_parts, cost.total_eur or 0.0))
        stage = stages[cheapest.stage]
        sentence = f"A million output tokens cost EUR {format_eur(cheapest.total_eur)} at this load"
        sentence += f" ({stage_label(stage)}: {'; '.join(_cost_details(cheapest, stage))})."
        return sentence
    efficient = [stage for stage in stages.values() if stage.tokens_per_joule]
    if not efficient:
        return ""
    stage = max(efficient, key=lambda stage: stage.tokens_per_joule or 0.0)
    return f"The GPUs give {format_number(stage.tokens_per_joule)} output tokens per joule ({stage_label(stage)})."


def _cost_details(cost: StageCost, stage: StageResult) -> Sequence[str]:
    """The parts of a cost, and what is not known of it."""
    details = []
    details.append("rent unknown" if cost.rent_eur is None else f"rent {format_eur(cost.rent_eur)}")
    if cost.energy_eur is not None:
        details.append(f"energy of the GPUs {format_eur(cost.energy_eur)}")
    if stage.tokens_per_joule:
        details.append(f"{format_number(stage.tokens_per_joule)} tokens per joule")
    return details


def format_eur(value: float | None) -> str:
    """A price with two decimals, or with two digits that count if it is less than a cent."""
    if value is None:
        return format_number(None)
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"
