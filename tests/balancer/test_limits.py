from gpumesh.balancer.limits import CEILING_S, ParallelLimit, learn_limit


def after(limit: ParallelLimit, waited_ms: float, *, beside: int, now: float) -> ParallelLimit:
    return learn_limit(limit, waited_ms=waited_ms, total_ms=2000.0 + waited_ms, concurrent=beside, now=now)


def simulate(slots: int, rounds: int = 20) -> ParallelLimit:
    """A server with so many slots, always offered all that the limit allows."""
    limit = ParallelLimit()
    for second in range(rounds):
        now = float(second)
        beside = limit.max_in_flight(now)
        limit = after(limit, 0.0 if beside <= slots else 1500.0, beside=beside, now=now)
    return limit


def test_the_true_number_of_slots_is_found() -> None:
    for slots in (1, 2, 4, 8):
        assert simulate(slots).proven == slots


def test_past_the_proven_number_it_is_tried_again_only_after_a_while() -> None:
    limit = simulate(2)
    assert limit.max_in_flight(20.0) == 2
    assert limit.max_in_flight(20.0 + CEILING_S) == 3


def test_a_server_restarted_with_fewer_slots_is_noticed() -> None:
    limit = ParallelLimit(proven=4, ceiling_until=None)
    for second in range(10):
        now = float(second)
        beside = min(limit.max_in_flight(now), 4)
        limit = after(limit, 0.0 if beside <= 1 else 1500.0, beside=beside, now=now)
    assert limit.proven == 1


def test_an_answer_without_durations_teaches_nothing() -> None:
    assert learn_limit(ParallelLimit(), waited_ms=None, total_ms=5.0, concurrent=9, now=0.0) == ParallelLimit()
