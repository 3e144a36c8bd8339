from gpumesh.backends.base import Counters
from gpumesh.balancer.limits import RETRY_AFTER_S, Limit, learned, waited_inside_ms


def answer(waited_ms: float) -> Counters:
    return Counters(total_ms=2000.0 + waited_ms, load_ms=100.0, prompt_ms=400.0, eval_ms=1500.0)


def test_time_inside_the_server_that_no_duration_covers_was_spent_waiting() -> None:
    assert waited_inside_ms(answer(750.0)) == 750.0
    assert waited_inside_ms(Counters()) is None
    assert waited_inside_ms(Counters(total_ms=1.0, eval_ms=5.0)) == 0.0


def simulate(slots: int, rounds: int = 20) -> Limit:
    """A server with so many slots, always offered all that the limit allows."""
    limit = Limit()
    for second in range(rounds):
        now = float(second)
        beside = limit.offered(now)
        limit = learned(limit, answer(0.0 if beside <= slots else 1500.0), beside=beside, now=now)
    return limit


def test_the_true_number_of_slots_is_found() -> None:
    for slots in (1, 2, 4, 8):
        assert simulate(slots).proven == slots


def test_past_the_proven_number_it_is_tried_again_only_after_a_while() -> None:
    limit = simulate(2)
    assert limit.offered(20.0) == 2
    assert limit.offered(20.0 + RETRY_AFTER_S) == 3


def test_a_server_restarted_with_fewer_slots_is_noticed() -> None:
    limit = Limit(proven=4, ceiling_until=None)
    for second in range(10):
        now = float(second)
        beside = min(limit.offered(now), 4)
        limit = learned(limit, answer(0.0 if beside <= 1 else 1500.0), beside=beside, now=now)
    assert limit.proven == 1


def test_an_answer_without_durations_teaches_nothing() -> None:
    assert learned(Limit(), Counters(tokens=5), beside=9, now=0.0) == Limit()
