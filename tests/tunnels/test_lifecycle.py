"""The lifecycle over any sequence of events: it never gives up, keeps its intervals, and its state is consistent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.state import TunnelPhase
from gpumesh.tunnels.lifecycle import (
    Cause,
    CloseRequested,
    Connected,
    ConnectionFailed,
    Decision,
    HoldReleased,
    HoldRequested,
    Lifecycle,
    LifecycleEvent,
    NetworkChanged,
    OpenRequested,
    RepairSeen,
    RetryDue,
    RetryRequested,
    RetryTiming,
    Suspected,
    Woke,
    step,
)

REFUSED = Cause("connect-refused", "nothing listens on 192.0.2.1:22")
KEY = Cause("auth-refused", "the host accepts none of our keys", hint="add the key", needs_person=True)
TIMING = RetryTiming()

events: st.SearchStrategy[LifecycleEvent] = st.sampled_from(
    [
        Connected(),
        ConnectionFailed(REFUSED),
        ConnectionFailed(KEY),
        RetryDue(),
        RetryRequested(),
        RepairSeen(),
        Suspected(),
        Woke(),
        NetworkChanged(),
        OpenRequested(),
    ]
)
jitters = st.floats(0.0, 1.0, exclude_max=True)
# (event, seconds since the event before, jitter)
histories = st.lists(st.tuples(events, st.floats(0.0, 120.0), jitters), max_size=60)


def play(history: list[tuple[LifecycleEvent, float, float]]) -> tuple[Lifecycle, float]:
    life, now = Lifecycle(), 1000.0
    life, decision = step(life, OpenRequested(), now=now, jitter=0.0)
    assert decision is Decision.CONNECT
    for event, wait, jitter in history:
        now += wait
        life, _ = step(life, event, now=now, jitter=jitter)
    return life, now


@given(histories)
def test_it_never_gives_up(history: list[tuple[LifecycleEvent, float, float]]) -> None:
    life, now = play(history)
    if life.waiting:
        assert life.retry_at is not None
        assert life.retry_at - now <= TIMING.failed_retry_s * 1.1
        life, decision = step(life, RetryDue(), now=life.retry_at, jitter=0.5)
        assert decision is Decision.CONNECT
    assert life.phase in (TunnelPhase.CONNECTING, TunnelPhase.UP)


@given(histories)
def test_the_state_is_consistent(history: list[tuple[LifecycleEvent, float, float]]) -> None:
    life, now = play(history)
    assert (life.retry_at is not None) == life.waiting
    assert life.since <= now
    assert life.phase is not TunnelPhase.FAILED or (life.cause is not None and life.cause.needs_person)
    assert life.phase is not TunnelPhase.BACKOFF or (life.cause is not None and not life.cause.needs_person)
    assert life.reconnects == max(0, life.connects - 1)


@given(histories, st.sampled_from([ConnectionFailed(REFUSED), ConnectionFailed(KEY)]), jitters)
def test_delays_are_within_their_limits(
    history: list[tuple[LifecycleEvent, float, float]], broke: ConnectionFailed, jitter: float
) -> None:
    life, now = play(history)
    if life.phase not in (TunnelPhase.CONNECTING, TunnelPhase.UP):
        return
    after, decision = step(life, broke, now=now, jitter=jitter)
    assert decision is Decision.WAIT
    assert after.retry_at is not None
    delay = after.retry_at - now
    if broke.cause.needs_person:
        assert TIMING.failed_retry_s * 0.89 <= delay <= TIMING.failed_retry_s * 1.11
    elif after.failures == 0:
        assert 0.0 <= delay <= TIMING.immediate_retry_s + 1e-6
    else:
        assert TIMING.initial_backoff_s - 1e-6 <= delay <= TIMING.max_backoff_s + 1e-6


@given(histories, st.lists(st.tuples(events, st.floats(0, 10), jitters)))
def test_closed_is_final(
    history: list[tuple[LifecycleEvent, float, float]], late: list[tuple[LifecycleEvent, float, float]]
) -> None:
    life, now = play(history)
    life, decision = step(life, CloseRequested(), now=now, jitter=0.0)
    assert decision is Decision.STOP
    for event, wait, jitter in late:
        now += wait
        after, decision = step(life, event, now=now, jitter=jitter)
        assert after == life
        assert decision is Decision.STOP


@given(histories, st.sampled_from([Woke(), RetryRequested()]))
def test_a_wake_or_a_persons_request_acts_at_once(
    history: list[tuple[LifecycleEvent, float, float]], event: LifecycleEvent
) -> None:
    life, now = play(history)
    after, decision = step(life, event, now=now, jitter=0.5)
    if life.phase is TunnelPhase.UP:
        assert decision is Decision.CHECK
    elif life.waiting:
        assert decision is Decision.CONNECT
    elif isinstance(event, Woke):
        assert decision is Decision.RECONNECT  # an attempt from before the sleep waits on a dead connection
    assert after.phase in (TunnelPhase.CONNECTING, TunnelPhase.UP)


@given(histories)
def test_a_repair_acts_at_once_where_the_tunnel_waits(history: list[tuple[LifecycleEvent, float, float]]) -> None:
    life, now = play(history)
    after, decision = step(life, RepairSeen(), now=now, jitter=0.5)
    if life.waiting:
        assert (after.phase, after.failures, decision) == (TunnelPhase.CONNECTING, 0, Decision.CONNECT)
    else:
        assert (after, decision) == (life, Decision.NOTHING)


@given(st.lists(st.floats(0.0, 0.01), min_size=2, max_size=30), jitters)
def test_a_burst_of_network_changes_is_one_attempt(gaps: list[float], jitter: float) -> None:
    life, now = play([(ConnectionFailed(KEY), 0.0, 0.0)])
    now += 5.0
    connects = 0
    for gap in gaps:
        now += gap
        life, decision = step(life, NetworkChanged(), now=now, jitter=jitter)
        connects += decision is Decision.CONNECT
        life, _ = step(life, ConnectionFailed(REFUSED), now=now, jitter=jitter)  # each attempt fails at once
    assert connects == 1


def test_intervals_double_up_to_the_maximum() -> None:
    life, now = play([])
    delays = []
    for _ in range(5000):
        life, _ = step(life, ConnectionFailed(REFUSED), now=now, jitter=0.5)
        assert life.retry_at is not None
        delays.append(life.retry_at - now)
        now = life.retry_at
        life, _ = step(life, RetryDue(), now=now, jitter=0.5)
    assert delays[:7] == pytest.approx([0.5, 1, 2, 4, 8, 16, 30])
    assert {round(delay, 6) for delay in delays[7:]} == {30.0}


def test_a_stable_connection_that_breaks_is_tried_again_at_once() -> None:
    life, now = play(
        [(ConnectionFailed(REFUSED), 0, 0), (RetryDue(), 1, 0), (ConnectionFailed(REFUSED), 0, 0), (RetryDue(), 9, 0)]
    )
    assert life.failures == 2
    life, _ = step(life, Connected(), now=now, jitter=0)
    flapping, _ = step(life, ConnectionFailed(REFUSED), now=now + TIMING.stable_s - 0.1, jitter=0.0)
    stable, _ = step(life, ConnectionFailed(REFUSED), now=now + TIMING.stable_s, jitter=0.9)
    assert flapping.failures == 3
    assert stable.failures == 0
    assert stable.retry_at is not None
    assert stable.retry_at - (now + TIMING.stable_s) <= TIMING.immediate_retry_s + 1e-6


def test_intervals_stay_short_for_a_while_after_a_wake() -> None:
    life, now = play(
        [(ConnectionFailed(REFUSED), 0, 0.5)] + [(RetryDue(), 60, 0.5), (ConnectionFailed(REFUSED), 0, 0.5)] * 10
    )
    life, _ = step(life, Woke(), now=now, jitter=0.5)
    woke_at = now
    while now < woke_at + TIMING.eager_period_s - TIMING.eager_max_backoff_s:
        life, _ = step(life, ConnectionFailed(REFUSED), now=now, jitter=0.99)
        assert life.retry_at is not None
        assert life.retry_at - now <= TIMING.eager_max_backoff_s + 1e-6
        now = life.retry_at
        life, _ = step(life, RetryDue(), now=now, jitter=0.5)
    life, _ = step(
        replace(life, failures=9), ConnectionFailed(REFUSED), now=woke_at + TIMING.eager_period_s, jitter=0.5
    )
    assert life.retry_at is not None
    assert life.retry_at - (woke_at + TIMING.eager_period_s) == pytest.approx(TIMING.max_backoff_s)


def test_the_cause_is_kept_while_up() -> None:
    life, _ = play([(ConnectionFailed(REFUSED), 0, 0), (RetryDue(), 2, 0), (Connected(), 1, 0)])
    assert life.phase is TunnelPhase.UP
    assert life.cause == REFUSED
    assert life.reconnects == 0


def test_a_late_event_changes_nothing() -> None:
    life, now = play([(ConnectionFailed(REFUSED), 0, 0.5)])
    for late in (Connected(), ConnectionFailed(KEY), Suspected(), OpenRequested()):
        assert step(life, late, now=now, jitter=0.5) == (life, Decision.NOTHING)
    assert step(life, RetryDue(), now=now, jitter=0.5) == (life, Decision.WAIT)


def hold(life: Lifecycle, now: float) -> Lifecycle:
    """The tunnel after ``HoldRequested`` and the loss of its connection."""
    life, decision = step(life, HoldRequested(), now=now, jitter=0.5)
    assert decision is Decision.CUT
    life, decision = step(life, ConnectionFailed(REFUSED), now=now, jitter=0.5)
    assert decision is Decision.WAIT
    return life


def test_a_held_tunnel_makes_no_attempt_until_it_is_released() -> None:
    life, now = play([(Connected(), 1, 0)])
    life = hold(life, now)
    assert (life.phase, life.retry_at, life.cause) == (TunnelPhase.BACKOFF, None, REFUSED)
    for event in (RetryDue(), RepairSeen(), Woke(), NetworkChanged(), Suspected(), HoldRequested(), OpenRequested()):
        after, decision = step(life, event, now=now + 500, jitter=0.5)
        assert after == life
        assert decision in (Decision.WAIT, Decision.NOTHING)
    life, decision = step(life, HoldReleased(), now=now + 500, jitter=0.5)
    assert (life.phase, life.held, decision) == (TunnelPhase.CONNECTING, False, Decision.CONNECT)


def test_a_persons_request_ends_a_hold() -> None:
    life, now = play([(Connected(), 1, 0)])
    life, decision = step(hold(life, now), RetryRequested(), now=now, jitter=0.5)
    assert (life.phase, life.held, decision) == (TunnelPhase.CONNECTING, False, Decision.CONNECT)
    assert step(life, HoldReleased(), now=now, jitter=0.5) == (life, Decision.NOTHING)


def test_a_hold_that_ends_before_the_loss_is_seen_holds_nothing() -> None:
    life, now = play([(Connected(), 1, 0)])
    life, _ = step(life, HoldRequested(), now=now, jitter=0.5)
    life, decision = step(life, HoldReleased(), now=now, jitter=0.5)
    assert (life.phase, decision) == (TunnelPhase.UP, Decision.NOTHING)
    life, _ = step(life, ConnectionFailed(REFUSED), now=now, jitter=0.5)
    assert life.retry_at is not None


@given(histories)
def test_only_a_tunnel_that_is_up_can_be_held(history: list[tuple[LifecycleEvent, float, float]]) -> None:
    life, now = play(history)
    after, decision = step(life, HoldRequested(), now=now, jitter=0.5)
    if life.phase is TunnelPhase.UP:
        assert (after, decision) == (replace(life, held=True), Decision.CUT)
    else:
        assert (after, decision) == (life, Decision.NOTHING)
