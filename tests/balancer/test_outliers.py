"""A node that becomes slow is found, recovers, and is never all of the fleet."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.outliers import (
    FORGET_SLOW_S,
    IDLE_PROBE_S,
    MAX_FACTOR,
    MIN_PAST,
    MIN_RECENT,
    PROBE_EVERY,
    OutlierWatch,
)

NODES = ("a", "b", "c", "d")
ALL = frozenset(NODES)


class Fleet:
    """Nodes that answer one after the other, one answer a second each."""

    def __init__(self, *names: str) -> None:
        self.watch = OutlierWatch()
        self.names = names or NODES
        self.now = 0.0

    def answer(self, count: int = 1, *, tokens_per_s: float = 100.0, late: float = 1.0, **slow: float) -> None:
        """``count`` answers of each node. ``slow``: by node, how many times slower it is; 0: it gives no answer."""
        for _ in range(count):
            self.now += 1.0
            for name in self.names:
                times = slow.get(name, 1.0)
                if times:
                    self.watch.add_first_token(name, 0.2 * late * times, 0.2, self.now)
                    self.watch.add_decode_rate(name, "m", tokens_per_s / times, self.now)

    def slow(self) -> dict[str, float]:
        return dict(self.watch.factors(set(self.names), self.now))


@pytest.fixture
def fleet() -> Fleet:
    known = Fleet()
    known.answer(30)
    return known


def test_a_fleet_as_usual_has_no_outlier(fleet: Fleet) -> None:
    assert fleet.slow() == {}
    assert fleet.watch.slowness("a", fleet.now) is None
    assert not fleet.watch.wants_probe("a", fleet.now + 100.0, in_flight=0)


def test_a_node_that_becomes_slow_gets_a_factor_after_a_few_answers(fleet: Fleet) -> None:
    fleet.answer(MIN_RECENT - 1, a=4.0)
    assert fleet.slow() == {}, "a few slow answers happen"
    fleet.answer(2, a=4.0)
    assert set(fleet.slow()) == {"a"}
    assert fleet.slow()["a"] == pytest.approx(4.0, rel=0.2)
    slowness = fleet.watch.slowness("a", fleet.now)
    assert slowness is not None
    assert slowness.first_token == pytest.approx(4.0, rel=0.2)
    assert slowness.decode == pytest.approx(4.0, rel=0.2)


def test_either_quantity_is_enough(fleet: Fleet) -> None:
    for _ in range(9):
        fleet.watch.add_first_token("a", 1.0, 0.2, fleet.now)
        fleet.watch.add_decode_rate("b", "m", 10.0, fleet.now)
    assert set(fleet.slow()) == {"a", "b"}


def test_single_slow_answers_do_not_matter(fleet: Fleet) -> None:
    for _ in range(20):
        fleet.answer(1, a=50.0)
        fleet.answer(2)
        assert fleet.slow() == {}


def test_when_the_others_are_slower_too_it_is_the_work(fleet: Fleet) -> None:
    fleet.answer(20, tokens_per_s=25.0, late=3.0)
    assert fleet.slow() == {}
    fleet.answer(12, tokens_per_s=25.0, late=3.0, b=4.0)
    assert set(fleet.slow()) == {"b"}, "it is slower than they are"


def test_a_fast_fleet_makes_no_node_slow(fleet: Fleet) -> None:
    fleet.answer(20, a=1.0, b=0.1, c=0.1, d=0.1)
    assert fleet.slow() == {}, "it is as fast as it was"


def test_the_factor_is_bounded(fleet: Fleet) -> None:
    fleet.answer(12, a=1000.0)
    assert fleet.slow() == {"a": MAX_FACTOR}


def test_it_recovers_by_a_few_probes_and_does_not_flutter(fleet: Fleet) -> None:
    fleet.answer(12, a=4.0)
    fleet.answer(1, a=1.0)
    assert "a" in fleet.slow(), "one fast answer of three"
    fleet.answer(1, a=1.0)
    assert fleet.slow() == {}
    fleet.answer(12, a=3.0)
    assert "a" in fleet.slow()
    fleet.answer(3, a=1.7)
    assert "a" in fleet.slow(), "not yet as fast as usual"
    fleet.answer(3, a=1.2)
    assert fleet.slow() == {}
    fleet.answer(9, a=1.7)
    assert fleet.slow() == {}, "not so slow that it is an outlier"


def test_a_node_that_stays_slow_is_usual_in_the_end(fleet: Fleet) -> None:
    fleet.answer(12, a=3.0)
    assert "a" in fleet.slow()
    fleet.answer(50, a=3.0)
    assert "a" in fleet.slow()
    fleet.answer(500, a=3.0)
    assert fleet.slow() == {}


def test_at_most_half_of_the_nodes_that_could_serve_are_slow(fleet: Fleet) -> None:
    for name, times in (("a", 3.0), ("b", 5.0), ("c", 30.0)):
        fleet.answer(9, **{name: times, **{other: 0.0 for other in NODES if other != name}})
    assert all(fleet.watch.slowness(name, fleet.now) for name in "abc")
    assert set(fleet.slow()) == {"b", "c"}, "the slowest"
    assert set(fleet.watch.factors({"a", "b", "d"}, fleet.now)) == {"b"}
    assert fleet.watch.factors({"c"}, fleet.now) == {}
    assert fleet.watch.factors(set(), fleet.now) == {}


def test_a_new_node_has_no_past_to_differ_from() -> None:
    fleet = Fleet()
    fleet.answer(MIN_PAST, a=9.0)
    assert fleet.slow() == {}
    fleet.answer(20, a=9.0)
    assert fleet.slow() == {}, "it was always so: its forecast knows"
    fleet.watch.forget("a")
    fleet.answer(5, a=99.0)
    assert fleet.slow() == {}


def test_models_of_different_speed_are_not_mixed_up() -> None:
    fleet = Fleet()
    for _ in range(40):
        for name in NODES:
            fleet.watch.add_decode_rate(name, "small", 200.0, fleet.now)
            fleet.watch.add_decode_rate(name, "big", 10.0, fleet.now)
    for _ in range(20):
        fleet.watch.add_decode_rate("a", "big", 10.0, fleet.now)
    assert fleet.slow() == {}


def test_probes_come_at_intervals_or_when_it_is_idle(fleet: Fleet) -> None:
    fleet.answer(12, a=4.0)
    watch, now = fleet.watch, fleet.now
    watch.record_choice("a", ALL, now)
    for _ in range(PROBE_EVERY - 1):
        assert not watch.wants_probe("a", now, in_flight=0)
        watch.record_choice("b", ALL, now)
    assert watch.wants_probe("a", now, in_flight=0)
    assert not watch.wants_probe("a", now, in_flight=1), "the request there will tell"
    watch.record_choice("a", ALL, now)
    assert not watch.wants_probe("a", now, in_flight=0)
    watch.record_choice("b", {"b", "c"}, now + 1.0)
    assert watch.wants_probe("a", now + IDLE_PROBE_S, in_flight=0), "nobody has asked it for a while"
    assert watch.slowness("a", now + FORGET_SLOW_S + 1.0) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300, 1e-300])
def test_absurd_figures_are_ignored(fleet: Fleet, value: float) -> None:
    for _ in range(30):
        fleet.watch.add_first_token("a", value, 0.2, fleet.now)
        fleet.watch.add_first_token("a", 0.2, value, fleet.now)
        fleet.watch.add_decode_rate("a", "m", value, fleet.now)
    assert fleet.slow() == {}


@given(
    st.lists(
        st.tuples(st.sampled_from(NODES), st.floats(), st.floats(), st.sampled_from(["m", "n"]), st.floats(0, 2000)),
        max_size=200,
    )
)
def test_whatever_a_host_sends_factors_are_bounded_and_half_of_the_nodes_are_normal(
    answers: list[tuple[str, float, float, str, float]],
) -> None:
    fleet = Fleet()
    fleet.answer(20)
    for node, seconds, rate, model, later in answers:
        fleet.now += later
        fleet.watch.add_first_token(node, seconds, 0.2, fleet.now)
        fleet.watch.add_decode_rate(node, model, rate, fleet.now)
        fleet.watch.record_choice(node, ALL, fleet.now)
        factors = fleet.slow()
        assert len(factors) <= len(NODES) // 2
        assert all(1.0 < factor <= MAX_FACTOR for factor in factors.values())
