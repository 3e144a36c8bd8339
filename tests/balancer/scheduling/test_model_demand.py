"""How often each model is asked for, and for how long it works."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.models.model_demand import FIRST_SERVICE_S, FIRST_SPAN_S, MAX_KEYS, WINDOW_S, ModelDemand
from tests.balancer.scheduling.fleets import KEY_A, KEY_B, NOW, A


def test_a_key_that_nobody_has_asked_for_has_no_rate() -> None:
    assert ModelDemand().rate(KEY_A, NOW) == 0.0
    assert ModelDemand().service_s(KEY_A) == FIRST_SERVICE_S


def test_the_first_request_counts_as_one_in_some_seconds() -> None:
    demand = ModelDemand()
    demand.note_request(KEY_A, NOW)
    assert demand.rate(KEY_A, NOW) == pytest.approx(1.0 / FIRST_SPAN_S, rel=0.1)


@pytest.mark.parametrize("per_s", [0.1, 2.0])
@pytest.mark.parametrize("seconds", [60, 600])
def test_a_steady_rate_is_found(per_s: float, seconds: int) -> None:
    demand = ModelDemand()
    for number in range(int(seconds * per_s)):
        demand.note_request(KEY_A, NOW + number / per_s)
    assert demand.rate(KEY_A, NOW + seconds) == pytest.approx(per_s, rel=0.2)


def test_a_burst_is_forgotten() -> None:
    demand = ModelDemand()
    for _ in range(100):
        demand.note_request(KEY_A, NOW)
    assert demand.rate(KEY_A, NOW) > 1.0
    assert demand.rate(KEY_A, NOW + 10.0 * WINDOW_S) < 0.001


def test_requests_that_differ_in_what_they_load_are_counted_apart() -> None:
    demand = ModelDemand()
    demand.note_request(ResidencyKey(A, 8192), NOW)
    assert demand.rate(KEY_A, NOW) == 0.0
    assert demand.rate(ResidencyKey(A, 8192), NOW) > 0.0


def test_the_time_of_service_is_a_mean_in_which_the_newest_count_more() -> None:
    demand = ModelDemand()
    demand.note_service(KEY_A, 7.0)
    assert demand.service_s(KEY_A) == FIRST_SERVICE_S, "nobody has asked for it"
    demand.note_request(KEY_A, NOW)
    demand.note_service(KEY_A, 1.0)
    assert demand.service_s(KEY_A) == 1.0
    demand.note_service(KEY_A, 3.0)
    assert demand.service_s(KEY_A) == 2.0
    for _ in range(100):
        demand.note_service(KEY_A, 8.0)
    assert demand.service_s(KEY_A) == pytest.approx(8.0, rel=0.01)


def test_a_client_that_asks_for_many_contexts_does_not_make_the_mesh_forget_a_model_in_use() -> None:
    demand = ModelDemand()
    demand.note_request(KEY_B, NOW)
    for context in range(2 * MAX_KEYS):
        demand.note_request(ResidencyKey(A, context), NOW)
        if context % 100 == 0:
            demand.note_request(KEY_B, NOW)
    assert demand.rate(KEY_B, NOW) == pytest.approx(21 / FIRST_SPAN_S, rel=0.1)
    known = sum(demand.rate(ResidencyKey(A, context), NOW) > 0.0 for context in range(2 * MAX_KEYS))
    assert known == MAX_KEYS - 1


@given(st.lists(st.tuples(st.floats(0.0, 1e4), st.booleans(), st.floats(0.0, 1e5)), max_size=40))
def test_figures_are_finite_whatever_the_times(events: list[tuple[float, bool, float]]) -> None:
    demand, now = ModelDemand(), NOW
    for seconds, is_request, service_s in events:
        now += seconds
        if is_request:
            demand.note_request(KEY_A, now)
        else:
            demand.note_service(KEY_A, service_s)
        assert 0.0 <= demand.rate(KEY_A, now) < math.inf
        assert 0.0 <= demand.service_s(KEY_A) < math.inf
