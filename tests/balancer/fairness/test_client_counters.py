import pytest

from gpumesh.balancer.fairness import client_counters
from gpumesh.balancer.fairness.client_counters import MAX_CHARGE, MAX_IDLE_CLIENTS, MAX_LAG, ClientCounters


def test_a_client_that_comes_back_is_lifted_to_the_level_or_to_its_least_competitor() -> None:
    counters = ClientCounters()
    for _ in range(3):
        counters.grant_unqueued("steady", 100.0)
    assert counters.level == 200.0
    assert counters.start_waiting("new", None) == 200.0
    assert counters.start_waiting("lucky", 150.0) == 150.0
    assert counters.start_waiting("steady", 150.0) == 300.0, "never lowered"


def test_a_client_far_behind_is_lifted_at_its_first_slot() -> None:
    counters = ClientCounters()
    counters.start_waiting("behind", None)
    counters.grant_unqueued("ahead", 100_000.0)
    counters.grant_unqueued("ahead", 10.0)
    assert counters.grant("behind", 5.0) == 100_000.0 - MAX_LAG + 5.0


def test_few_idle_clients_are_remembered_and_waiting_ones_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_counters, "MAX_IDLE_CLIENTS", 10)
    assert MAX_IDLE_CLIENTS > 10
    counters = ClientCounters()
    counters.start_waiting("waits", None)
    counters.charge("waits", 7.0)
    for number in range(100):
        counters.charge(f"client {number}", 1.0)
        counters.charge("often seen", 1.0)
    assert len(counters) == 11
    assert counters.of("waits") == 7.0
    assert counters.of("often seen") == 100.0
    assert counters.of("client 0") == counters.level


@pytest.mark.parametrize(
    ("tokens", "counted"),
    [(float("nan"), 0.0), (float("inf"), 0.0), (1e300, MAX_CHARGE), (-1e300, -MAX_CHARGE), (5, 5.0)],
)
def test_absurd_charges_are_bounded(tokens: float, counted: float) -> None:
    counters = ClientCounters()
    assert counters.charge("a", tokens) == counted
