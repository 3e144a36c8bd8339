from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.breaker import FIRST_OPEN_S, MAX_OPEN_S, THRESHOLD, Breaker, BreakerPhase


def open_breaker(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(THRESHOLD):
        breaker = breaker.record_failure(at)
    return breaker


def test_it_opens_only_after_failures_in_a_row() -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker = breaker.record_failure(0.0).record_failure(0.0).record_success()
    assert breaker.phase(0.0) is BreakerPhase.CLOSED
    assert open_breaker().phase(0.0) is BreakerPhase.OPEN
    assert not open_breaker().allows(0.5)


def test_half_open_lets_one_trial_through_at_a_time() -> None:
    breaker = open_breaker()
    now = FIRST_OPEN_S
    assert breaker.allows(now)
    breaker = breaker.record_start(now)
    assert not breaker.allows(now)
    assert breaker.cancel_trial().allows(now), "the client left: the next may try"
    assert breaker.record_success().phase(now) is BreakerPhase.CLOSED


def test_each_failed_trial_waits_longer_up_to_a_bound() -> None:
    breaker, now, pauses = open_breaker(), 0.0, []
    for _ in range(8):
        assert breaker.open_until is not None
        now = breaker.open_until
        breaker = breaker.record_start(now).record_failure(now)
        assert breaker.open_until is not None
        pauses.append(breaker.open_until - now)
    assert pauses[:3] == [2.0, 4.0, 8.0]
    assert max(pauses) == MAX_OPEN_S


@given(st.lists(st.tuples(st.sampled_from(["start", "ok", "fail", "undecided"]), st.floats(0, 40))))
def test_it_never_stays_open_for_ever(steps: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for step, later in steps:
        now += later
        match step:
            case "start":
                breaker = breaker.record_start(now)
            case "ok":
                breaker = breaker.record_success()
            case "fail":
                breaker = breaker.record_failure(now)
            case "undecided":
                breaker = breaker.cancel_trial()
    assert breaker.cancel_trial().allows(now + MAX_OPEN_S)


def test_a_forgiven_failure_leaves_it_as_it_was() -> None:
    assert Breaker().record_failure(0.0).forgive_failure(0.0) == Breaker()
    assert open_breaker().forgive_failure(0.1).phase(0.1) is BreakerPhase.CLOSED
    trial = open_breaker().record_start(FIRST_OPEN_S).record_failure(FIRST_OPEN_S).forgive_failure(FIRST_OPEN_S)
    assert trial.phase(FIRST_OPEN_S) is BreakerPhase.HALF_OPEN, (
        "the trial says nothing about the node: another may be made"
    )
    assert trial.allows(FIRST_OPEN_S)
    assert Breaker().forgive_failure(0.0) == Breaker()
