from gpumesh.balancer.limits import CEILING_S, ParallelLimit, learn_limit


def learn(limit: ParallelLimit, waited_ms: float, *, concurrent: int, now: float) -> ParallelLimit:
    return learn_limit(limit, waited_ms=waited_ms, total_ms=2000.0 + waited_ms, concurrent=concurrent, now=now)


def simulate(slots: int, rounds: int = 20) -> ParallelLimit:
    """A server with so many slots that always gets as many requests as the limit allows."""
    limit = ParallelLimit()
    for second in range(rounds):
        now = float(second)
        concurrent = limit.max_in_flight(now)
        limit = learn(limit, 0.0 if concurrent <= slots else 1500.0, concurrent=concurrent, now=now)
    return limit


def test_the_true_number_of_slots_is_found() -> None:
    for slots in (1, 2, 4, 8):
        assert simulate(slots).proven == slots


def test_one_more_than_proven_is_tried_again_only_after_a_while() -> None:
    limit = simulate(2)
    assert limit.max_in_flight(20.0) == 2
    assert limit.max_in_flight(20.0 + CEILING_S) == 3


def test_a_server_restarted_with_fewer_slots_is_noticed() -> None:
    limit = ParallelLimit(proven=4, ceiling_until=None)
    for second in range(10):
        now = float(second)
        concurrent = min(limit.max_in_flight(now), 4)
        limit = learn(limit, 0.0 if concurrent <= 1 else 1500.0, concurrent=concurrent, now=now)
    assert limit.proven == 1


def test_an_answer_without_durations_teaches_nothing() -> None:
    assert learn_limit(ParallelLimit(), waited_ms=None, total_ms=5.0, concurrent=9, now=0.0) == ParallelLimit()
