"""What a million output tokens cost: the rent of the nodes, and the energy of their GPUs. Pure.

- rent: EUR an hour of all nodes of the stage ÷ output tokens an hour. A node that is rented costs its rent whether or
  not it has work, so the rent for a token falls as the load rises.
- energy: EUR a kWh ÷ output tokens a kWh. A kWh is 3.6 million joules. nvidia-smi tells the power of the GPUs only: the
  rest of the host (often 50 to 150 W) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gpumesh.bench.figures.summary import StageResult, stage_label

JOULES_PER_KWH = 3.6e6
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Prices:
    """``eur_per_kwh`` is the price of energy, ``None`` if nobody asks for its cost. ``eur_per_hour`` has the rents of
    the nodes that have one."""

    eur_per_kwh: float | None = None
    eur_per_hour: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def are_given(self) -> bool:
        """Whether there is any price."""
        return self.eur_per_kwh is not None or bool(self.eur_per_hour)


NO_PRICES = Prices()


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a million output tokens cost in EUR at the load of a stage. ``stage`` is the stage's label.

    ``rent_eur`` is ``None`` if the rent of a node of the stage is not known, ``energy_eur`` if the price of energy or
    the power of a GPU is not known.
    """

    stage: str
    rent_eur: float | None
    energy_eur: float | None

    @property
    def unknown_parts(self) -> int:
        """How many of the two parts are not known."""
        return (self.rent_eur is None) + (self.energy_eur is None)

    @property
    def total_eur(self) -> float | None:
        """The sum of what is known; ``None`` if nothing is."""
        known = [part for part in (self.rent_eur, self.energy_eur) if part is not None]
        return math.fsum(known) if known else None


def stage_costs(stages: Sequence[StageResult], prices: Prices, nodes: Sequence[str]) -> tuple[StageCost, ...]:
    """The cost of each stage whose cost is known at least in part. ``nodes`` are the measured nodes: a stage of the
    mesh pays the rent of all of them. A stage over several routes has no cost, because it measures the routes."""
    if not prices.are_given:
        return ()
    costs = []
    for stage in stages:
        if stage.route is None:
            stage_nodes = nodes if stage.node is None else [stage.node]
            cost = StageCost(stage_label(stage), _rent(stage, prices, stage_nodes), _energy(stage, prices.eur_per_kwh))
            if cost.total_eur is not None:
                costs.append(cost)
    return tuple(costs)


def _rent(stage: StageResult, prices: Prices, nodes: Sequence[str]) -> float | None:
    """The rent of these nodes for a million output tokens, in EUR; ``None`` if a rent or the rate is unknown."""
    rents = [prices.eur_per_hour.get(node) for node in nodes]
    known_rents = [rent for rent in rents if rent is not None]
    tokens_per_s = stage.rates.best_tokens_per_s
    if not tokens_per_s or len(known_rents) < len(rents):
        return None
    return math.fsum(known_rents) / (tokens_per_s * 3600.0) * MILLION


def _energy(stage: StageResult, eur_per_kwh: float | None) -> float | None:
    """The energy of the GPUs for a million output tokens, in EUR; ``None`` if its price or the energy is unknown."""
    if eur_per_kwh is None or not stage.tokens_per_joule:
        return None
    return MILLION / stage.tokens_per_joule / JOULES_PER_KWH * eur_per_kwh
