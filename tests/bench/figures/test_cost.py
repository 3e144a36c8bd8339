"""What a million tokens cost: by hand, and unknown where a price, a power or a rate is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.bench.figures.cost import Prices, stage_costs
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import make_stage_run, record, stage, summarize_only


def measured(name: str = "mesh", *, tokens_per_s: float | None = 100.0, **changes: Any) -> StageResult:
    made = summarize_only(make_stage_run(record(), of=stage(name)))
    rates = replace(made.rates, loaded_tokens_per_s=tokens_per_s, output_tokens_per_s=tokens_per_s)
    return replace(made, rates=rates, **changes)


RENTS = {"iceland": 0.36, "moon": 0.72}
NODES = ["iceland", "moon"]


def test_the_rent_of_all_nodes_and_the_energy_of_their_gpus() -> None:
    # 100 tokens/s are 360,000 an hour: a million takes 1 / 0.36 hours. At 0.5 tokens/J it takes 2 MJ = 0.5556 kWh.
    (cost,) = stage_costs([measured(tokens_per_joule=0.5)], Prices(0.3, RENTS), NODES)
    assert cost.stage == "mesh"
    assert cost.rent_eur == pytest.approx((0.36 + 0.72) / 0.36)
    assert cost.energy_eur == pytest.approx(2e6 / 3.6e6 * 0.3)
    assert cost.total_eur == pytest.approx(3.0 + 1 / 6)


def test_a_node_alone_pays_its_own_rent() -> None:
    alone = measured("iceland", node="iceland", kind=StageKind.NODE)
    (cost,) = stage_costs([alone], Prices(None, RENTS), NODES)
    assert (cost.stage, cost.energy_eur) == ("iceland", None)
    assert cost.total_eur == cost.rent_eur == pytest.approx(1.0)


def test_the_rate_while_all_slots_are_busy_counts() -> None:
    made = measured()
    made = replace(made, rates=replace(made.rates, output_tokens_per_s=50.0))
    (cost,) = stage_costs([made], Prices(None, RENTS), ["iceland"])
    assert cost.rent_eur == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("made", "prices"),
    [
        (measured(tokens_per_joule=0.5), Prices()),
        (measured(tokens_per_joule=None), Prices(0.3)),
        (measured(), Prices(None, {"iceland": 0.36})),  # the rent of the other node is unknown
        (measured(tokens_per_s=None), Prices(None, RENTS)),
        (measured(tokens_per_s=0.0), Prices(None, RENTS)),
        (measured(route="gateway", tokens_per_joule=0.5), Prices(0.3, RENTS)),
    ],
)
def test_what_is_not_known_is_no_cost(made: StageResult, prices: Prices) -> None:
    assert stage_costs([made], prices, NODES) == ()


def test_a_machine_of_ones_own_has_no_rent_and_its_energy_has_a_price() -> None:
    (cost,) = stage_costs([measured(tokens_per_joule=0.5)], Prices(0.3, {"iceland": 0.0}), ["iceland"])
    assert cost.rent_eur == 0.0
    assert cost.total_eur == cost.energy_eur == pytest.approx(1 / 6)
