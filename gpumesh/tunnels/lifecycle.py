"""A tunnel's life as a pure state machine: events in, decisions out; no clock, no socket, no randomness of its own.

::

    idle ──Opened──▶ connecting ──Connected──▶ up
                      ▲      │                  │
            RetryDue, │      └─────Broke────────┤
        Nudged, Woke, │                         ▼
      NetworkChanged  └──────────── backoff, or failed when a person must act          (Closed leads to closed)

It never gives up. What a retry alone cannot help (a refused key, a changed host key) is ``failed`` and is tried again
slowly, because the person may act on the host as well as here. A connection that had been stable and broke is tried
again at once; one that keeps breaking soon after it came up backs off further each time, so that a flapping host is
not hammered. After a wake from sleep or a change of the network it is tried at once *and again* at short intervals:
Wi-Fi takes some 15 s to come back.

Times are seconds of one monotonic clock. ``jitter`` is a number in [0, 1) that the caller draws for each step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.state import TunnelPhase


@dataclass(frozen=True, slots=True)
class RetryTiming:
    """How patient a tunnel is, in seconds.

    ``initial_backoff_s`` doubles up to ``max_backoff_s``; ``failed_retry_s`` is the slow interval of ``failed``; a
    connection that lasted ``stable_s`` is forgiven its past; for ``eager_period_s`` after a wake no interval is longer
    than ``eager_max_backoff_s``. ``network_settle_s`` is the least time between two attempts that changes of the
    network can bring about.
    """

    initial_backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    failed_retry_s: float = 60.0
    stable_s: float = 10.0
    immediate_retry_s: float = 0.1
    eager_period_s: float = 45.0
    eager_max_backoff_s: float = 2.0
    network_settle_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a connection is not there. ``needs_person``: retrying alone cannot help."""

    code: str
    message: str
    hint: str | None = None
    needs_person: bool = False


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRequested:
    """The tunnel is wanted."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The attempt succeeded."""


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The attempt failed, or the connection that was up is gone."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The time that a WAIT asked for has come."""


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """A person asked to try now."""


@dataclass(frozen=True, slots=True)
class Suspected:
    """A request through the tunnel failed."""


@dataclass(frozen=True, slots=True)
class Woke:
    """The machine slept: whatever was connected, or about to be, is most likely gone."""


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """An address, a link or a route came or went."""


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The tunnel is not wanted any more."""


LifecycleEvent = (
    OpenRequested
    | Connected
    | ConnectionFailed
    | RetryDue
    | RetryRequested
    | Suspected
    | Woke
    | NetworkChanged
    | CloseRequested
)


class Decision(StrEnum):
    """What to do now. Exactly one for each event."""

    NOTHING = "nothing"
    CONNECT = "connect"
    RECONNECT = "reconnect"  # give up the attempt under way and begin another
    CHECK = "check"  # ask the host for a sign of life, now
    WAIT = "wait"  # until ``Lifecycle.retry_at``, then RetryDue
    STOP = "stop"


# -- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Where a tunnel is in its life. ``failures`` counts in a row; ``connects`` counts all that succeeded.

    ``cause`` is that of the last failure, kept while up as well (it answers "why did it reconnect?").
    ``retry_at`` is set in backoff and failed only.
    """

    phase: TunnelPhase = TunnelPhase.IDLE
    since: float = 0.0
    failures: int = 0
    connects: int = 0
    cause: Cause | None = None
    retry_at: float | None = None
    tried_at: float | None = None
    eager_until: float | None = None

    @property
    def reconnects(self) -> int:
        return max(0, self.connects - 1)

    @property
    def waiting(self) -> bool:
        return self.phase in (TunnelPhase.BACKOFF, TunnelPhase.FAILED)


def step(
    life: Lifecycle, event: LifecycleEvent, *, now: float, jitter: float, timing: RetryTiming | None = None
) -> tuple[Lifecycle, Decision]:
    """The next state and what to do about it. An event that does not fit the phase (a late one) changes nothing."""
    timing = timing or RetryTiming()
    if life.phase is TunnelPhase.CLOSED:
        return life, Decision.STOP
    match event:
        case CloseRequested():
            return replace(life, phase=TunnelPhase.CLOSED, since=now, retry_at=None), Decision.STOP
        case OpenRequested() if life.phase is TunnelPhase.IDLE:
            return _connect(life, now), Decision.CONNECT
        case Connected() if life.phase is TunnelPhase.CONNECTING:
            return replace(life, phase=TunnelPhase.UP, since=now, connects=life.connects + 1), Decision.NOTHING
        case ConnectionFailed(cause) if life.phase in (TunnelPhase.CONNECTING, TunnelPhase.UP):
            return _broke(life, cause, now, jitter, timing), Decision.WAIT
        case RetryDue() if life.waiting:
            if life.retry_at is not None and now < life.retry_at:
                return life, Decision.WAIT
            return _connect(life, now), Decision.CONNECT
        case RetryRequested() if life.waiting:
            return _connect(replace(life, failures=0), now), Decision.CONNECT
        case RetryRequested() | Suspected() if life.phase is TunnelPhase.UP:
            return life, Decision.CHECK
        case Woke() | NetworkChanged():
            return _surroundings_changed(life, event, now, timing)
    return life, Decision.NOTHING


def _connect(life: Lifecycle, now: float) -> Lifecycle:
    return replace(life, phase=TunnelPhase.CONNECTING, since=now, tried_at=now, retry_at=None)


def _broke(life: Lifecycle, cause: Cause, now: float, jitter: float, timing: RetryTiming) -> Lifecycle:
    if cause.needs_person:
        delay = timing.failed_retry_s * (0.9 + 0.2 * jitter)
        phase, failures = TunnelPhase.FAILED, life.failures + 1
    else:
        stable = life.phase is TunnelPhase.UP and now - life.since >= timing.stable_s
        phase, failures = TunnelPhase.BACKOFF, 0 if stable else life.failures + 1
        eager = life.eager_until is not None and now < life.eager_until
        delay = _delay(failures, jitter, timing.eager_max_backoff_s if eager else timing.max_backoff_s, timing)
    return replace(life, phase=phase, since=now, failures=failures, cause=cause, retry_at=now + delay)


def _delay(failures: int, jitter: float, longest: float, timing: RetryTiming) -> float:
    """Half to one and a half of the doubled interval, within the bounds, so that many nodes that were lost together
    do not come back together."""
    if failures == 0:
        return timing.immediate_retry_s * jitter
    # The exponent is bounded: 2.0 ** 2000 would overflow after a long outage.
    interval = timing.initial_backoff_s * 2.0 ** min(failures - 1, 32)
    return min(longest, max(timing.initial_backoff_s, min(interval, longest) * (0.5 + jitter)))


def _surroundings_changed(
    life: Lifecycle, event: Woke | NetworkChanged, now: float, timing: RetryTiming
) -> tuple[Lifecycle, Decision]:
    if life.phase is TunnelPhase.IDLE:
        return life, Decision.NOTHING
    life = replace(life, eager_until=now + timing.eager_period_s)
    if life.phase is TunnelPhase.UP:
        return life, Decision.CHECK
    life = replace(life, failures=0)
    if life.phase is TunnelPhase.CONNECTING:
        if isinstance(event, Woke):
            return _connect(life, now), Decision.RECONNECT
        return life, Decision.NOTHING
    settled = (life.tried_at or 0.0) + timing.network_settle_s
    if isinstance(event, NetworkChanged) and life.tried_at is not None and now < settled:
        # Changes come in bursts (link, address, route): the first began an attempt, the rest must not each begin one.
        return replace(life, retry_at=min(life.retry_at or settled, settled)), Decision.WAIT
    return _connect(life, now), Decision.CONNECT
