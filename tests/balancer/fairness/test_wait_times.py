import pytest

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fairness.wait_times import FIRST_GUESS_S, MAX_WAIT_S, WaitTimes


def test_each_class_has_its_own_mean_and_none_is_below_a_higher_class() -> None:
    waits = WaitTimes()
    assert waits.usual_s(Priority.BATCH) == FIRST_GUESS_S
    for _ in range(100):
        waits.record(Priority.NORMAL, 10.0)
    assert waits.usual_s(Priority.INTERACTIVE) == FIRST_GUESS_S
    assert waits.usual_s(Priority.NORMAL) == pytest.approx(10.0)
    assert waits.usual_s(Priority.BATCH) == pytest.approx(10.0)


def test_absurd_waits_are_bounded_or_ignored() -> None:
    waits = WaitTimes()
    waits.record(Priority.NORMAL, float("nan"))
    waits.record(Priority.NORMAL, float("inf"))
    waits.record(Priority.NORMAL, -5.0)
    assert waits.usual_s(Priority.NORMAL) <= FIRST_GUESS_S
    for _ in range(100):
        waits.record(Priority.NORMAL, 1e300)
    assert waits.usual_s(Priority.NORMAL) <= MAX_WAIT_S
