from __future__ import annotations

import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.experience import FLEET_LEARN_INTERVAL_S, Experience
from gpumesh.balancer.work import Work
from tests.balancer.placed import make_placed

MODEL = "a:latest"
DEMAND = Demand(MODEL, residency=ResidencyKey(MODEL))


def answer(experience: Experience, account: NodeAccount, now: float, *, token_ms: float) -> None:
    placed = make_placed(account, DEMAND, Work(100.0, 50.0), now=now)
    counters = ServerCounters(prompt_tokens=100, tokens=50, prompt_ms=20.0, eval_ms=50 * token_ms, total_ms=9000.0)
    experience.learn_from_answer(placed, counters, now, mean_streams=1.0, stalled_share=0.0)


def test_each_node_learns_from_its_answers_and_the_fleet_from_a_part_of_them() -> None:
    experience = Experience()
    accounts = [NodeAccount(name, fleet_rates=experience.fleet_rates) for name in "ab"]
    answer(experience, accounts[0], 1.0, token_ms=10.0)
    assert experience.fleet_rates.decode_s(MODEL, 1.0) == pytest.approx(0.010)
    answer(experience, accounts[1], 1.0 + FLEET_LEARN_INTERVAL_S / 2, token_ms=20.0)
    assert accounts[1].rates.decode_s(MODEL, 1.0) == pytest.approx(0.020)
    assert experience.fleet_rates.decode_s(MODEL, 1.0) == pytest.approx(0.010), "so soon, the fleet does not learn"
    answer(experience, accounts[1], 1.0 + FLEET_LEARN_INTERVAL_S, token_ms=20.0)
    assert experience.fleet_rates.decode_s(MODEL, 1.0) > 0.010
