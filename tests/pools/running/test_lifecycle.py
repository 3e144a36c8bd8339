"""The life of a pool, as a state machine."""

from __future__ import annotations

import random

from gpumesh.pools.base import PoolPhase
from gpumesh.pools.running.lifecycle import (
    BecameReady,
    Cause,
    Ended,
    LoadBegan,
    MemberCameBack,
    PartFailed,
    Planned,
    PoolEvent,
    PoolLife,
    RestartTiming,
    RetryDue,
    StartRequested,
    StopRequested,
    step,
)

LOST = Cause("pool-failed", "the worker on beta has ended", lost_node="beta")
TOO_SMALL = Cause("pool-does-not-fit", "3.0 GiB are missing", needs_person=True)
STARTED: tuple[PoolEvent, ...] = (StartRequested(), Planned(), LoadBegan(), BecameReady())


def follow(*events: PoolEvent, life: PoolLife | None = None, now: float = 0.0, jitter: float = 0.5) -> PoolLife:
    life = life or PoolLife()
    for event in events:
        life = step(life, event, now=now, jitter=jitter)
    return life


def test_a_pool_is_planned_started_loaded_and_ready() -> None:
    life, phases = PoolLife(), []
    for event in STARTED:
        life = step(life, event, now=1.0, jitter=0.0)
        phases.append(life.phase)
    assert phases == [PoolPhase.PLANNING, PoolPhase.STARTING, PoolPhase.LOADING, PoolPhase.READY]
    assert life.starts == 1
    assert follow(StopRequested(), Ended(), life=life).phase is PoolPhase.STOPPED


def test_a_failure_ends_all_parts_before_the_next_start() -> None:
    failed = follow(*STARTED, PartFailed(LOST))
    assert (failed.phase, failed.cause) == (PoolPhase.STOPPING, LOST)
    assert failed.must_end
    waiting = follow(Ended(), life=failed, now=2.0)
    assert waiting.phase is PoolPhase.BACKOFF
    assert waiting.retry_at is not None
    assert follow(RetryDue(), life=waiting, now=waiting.retry_at - 0.1) == waiting
    again = follow(RetryDue(), life=waiting, now=waiting.retry_at)
    assert (again.phase, again.starts, again.cause) == (PoolPhase.PLANNING, 2, LOST)


def test_the_waits_double_up_to_a_limit_and_are_spread() -> None:
    life, waits = follow(StartRequested()), []
    for _ in range(12):
        life = follow(PartFailed(LOST), Ended(), life=life)
        assert life.retry_at is not None
        waits.append(life.retry_at)
        life = follow(RetryDue(), life=life, now=life.retry_at)
        life = step(life, Planned(), now=0.0, jitter=0.5)
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[-1] == RestartTiming().max_backoff_s
    spread = {follow(StartRequested(), PartFailed(LOST), Ended(), jitter=j / 10).retry_at for j in range(5, 10)}
    assert len(spread) == 5


def test_a_pool_that_was_stable_is_started_again_at_once() -> None:
    ready = follow(*STARTED)
    life = follow(PartFailed(LOST), Ended(), life=ready, now=RestartTiming().stable_s)
    assert life.failures == 0
    assert life.retry_at is not None
    assert life.retry_at <= RestartTiming().stable_s + RestartTiming().immediate_retry_s


def test_a_cause_that_needs_a_person_waits_for_one_or_for_a_member() -> None:
    life = follow(StartRequested(), PartFailed(TOO_SMALL), Ended())
    assert (life.phase, life.retry_at, life.wanted) == (PoolPhase.FAILED, None, True)
    assert follow(RetryDue(), life=life, now=1e9).phase is PoolPhase.FAILED
    assert follow(StartRequested(), life=life).phase is PoolPhase.PLANNING
    assert follow(MemberCameBack(), life=life).phase is PoolPhase.PLANNING
    assert follow(StopRequested(), life=life).phase is PoolPhase.STOPPED


def test_a_person_who_asks_gets_a_start_at_once_and_short_waits() -> None:
    life = follow(StartRequested())
    for _ in range(6):
        life = follow(PartFailed(LOST), Ended(), life=life)
        life = follow(RetryDue(), life=life, now=1e9)
    life = follow(PartFailed(LOST), Ended(), life=life)
    asked = follow(StartRequested(), life=life)
    assert (asked.phase, asked.failures) == (PoolPhase.PLANNING, 0)


def test_a_pool_that_is_wanted_again_while_it_stops_starts_after_its_end() -> None:
    life = follow(*STARTED, StopRequested(), StartRequested())
    assert life.phase is PoolPhase.STOPPING
    assert follow(Ended(), life=life).phase is PoolPhase.PLANNING


def test_a_start_that_is_asked_for_while_a_failed_pool_ends_comes_at_once() -> None:
    for cause in (LOST, TOO_SMALL):
        life = follow(*STARTED, PartFailed(cause), StartRequested())
        assert life.phase is PoolPhase.STOPPING
        assert follow(Ended(), life=life).phase is PoolPhase.PLANNING


def test_a_stop_during_the_end_after_a_failure_is_final() -> None:
    life = follow(*STARTED, PartFailed(LOST), StopRequested(), Ended())
    assert (life.phase, life.wanted, life.cause) == (PoolPhase.STOPPED, False, None)
    assert follow(RetryDue(), MemberCameBack(), life=life) == life


def test_no_order_of_events_starts_a_pool_before_its_parts_have_ended() -> None:
    rng = random.Random(17)
    kinds: list[PoolEvent] = [
        *(StartRequested(), StopRequested(), Planned(), LoadBegan(), BecameReady(), Ended(), RetryDue()),
        *(PartFailed(LOST), PartFailed(TOO_SMALL), MemberCameBack()),
    ]
    for _ in range(300):
        life, now = PoolLife(), 0.0
        for _ in range(60):
            event, now = rng.choice(kinds), now + rng.random() * 5
            after = step(life, event, now=now, jitter=rng.random())
            if after.phase is PoolPhase.PLANNING and life.phase is not PoolPhase.PLANNING:
                assert isinstance(event, Ended) or not life.has_parts
            assert after.wanted or after.phase in (PoolPhase.STOPPED, PoolPhase.STOPPING)
            assert (after.retry_at is not None) == (after.phase is PoolPhase.BACKOFF)
            life = after
