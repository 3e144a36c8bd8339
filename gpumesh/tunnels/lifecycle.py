"""A tunnel's life as a pure state machine (phases, backoff, retries): events in, decisions out. No clock, no sockets.

::

    idle ──OpenRequested──▶ connecting ──Connected──▶ up
                             ▲      │                  │
                   RetryDue, │      └─ConnectionFailed─┤
       RetryRequested, Woke, │                         ▼
  RepairSeen, NetworkChanged └──────────── backoff, or failed when a person must act   (CloseRequested: closed)

A tunnel never gives up. An error that a retry alone cannot cure (a refused key, a changed host key) brings the tunnel
into phase ``failed``. Even then the tunnel is tried again: at once if a person may have mended the cause on this
machine (``RepairSeen``), and slowly in any case, because a person may mend it on the host, where we do not see that.
After a stable connection breaks, the tunnel is tried again at once. If connections keep breaking soon after they came
up, each wait is longer than the last, so that a flapping host does not get many logins. After a wake from sleep or a
change of the network the tunnel is tried at once, and then at short intervals: Wi-Fi takes some 15 s to come back.

A tunnel can be held closed, to measure what an outage does (``HoldRequested``): its connection is cut, and no attempt
is made until ``HoldReleased``, or until a person asks for one (``RetryRequested``).

The machine has no clock, no socket and no randomness. Times are seconds of one monotonic clock, and ``jitter`` is a
number in [0, 1): for each step the caller reads the clock and draws the number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.tunnels.backoff import backoff_delay_s


@dataclass(frozen=True, slots=True)
class RetryTiming:
    """The intervals between attempts, in seconds.

    ``initial_backoff_s`` doubles with each failure, up to ``max_backoff_s``. ``failed_retry_s`` is the interval in
    phase ``failed``. A connection that lasted ``stable_s`` resets the count of failures, and the next attempt comes
    within ``immediate_retry_s``. For ``eager_period_s`` after a wake or a network change no interval is longer
    than ``eager_max_backoff_s``. ``network_settle_s`` is the least time between two attempts that network changes
    cause.
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
    """The reason why there is no connection. ``needs_person``: a retry alone cannot help."""

    code: str
    message: str
    hint: str | None = None
    needs_person: bool = False


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRequested:
    """The tunnel is wanted from now on."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The attempt succeeded."""


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The attempt failed, or the connection that was up is gone."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The moment ``Lifecycle.retry_at`` has come."""


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """A person asked to try now."""


@dataclass(frozen=True, slots=True)
class RepairSeen:
    """Something has changed on this machine that a failed attempt has used: a person may have mended the cause."""


@dataclass(frozen=True, slots=True)
class Suspected:
    """A request through the tunnel failed, so the host may be gone."""


@dataclass(frozen=True, slots=True)
class Woke:
    """The machine has woken from sleep: a connection, or an attempt under way, is most likely dead."""


@dataclass(frozen=True, slots=True)
class NetworkChanged:
    """An address, a link or a route came or went."""


@dataclass(frozen=True, slots=True)
class HoldRequested:
    """The connection is to be cut, and no attempt is to be made until ``HoldReleased``."""


@dataclass(frozen=True, slots=True)
class HoldReleased:
    """The end of ``HoldRequested``."""


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The tunnel is not wanted any more."""


LifecycleEvent = (
    OpenRequested
    | Connected
    | ConnectionFailed
    | RetryDue
    | RetryRequested
    | RepairSeen
    | Suspected
    | Woke
    | NetworkChanged
    | HoldRequested
    | HoldReleased
    | CloseRequested
)


class Decision(StrEnum):
    """The action that the caller of ``step`` takes. Each event leads to exactly one decision."""

    NOTHING = "nothing"
    CONNECT = "connect"
    RECONNECT = "reconnect"  # give up the attempt under way and start another
    CHECK = "check"  # ping the host now
    CUT = "cut"  # end the connection as a failure would; the loss is then reported as any other
    WAIT = "wait"  # until ``Lifecycle.retry_at``; then comes RetryDue
    STOP = "stop"


# -- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """The state of a tunnel. ``failures`` counts failures in a row; ``connects`` counts all successful attempts.

    ``since`` is the time at which the phase began, ``tried_at`` the time at which the last attempt began. ``cause`` is
    the cause of the last failure. It stays while the tunnel is up, where it explains the last reconnect. ``retry_at``
    is the time of the next attempt; it is set in the phases backoff and failed only, and not while the tunnel is
    ``held``. Until ``eager_until`` the intervals are short (see ``RetryTiming.eager_period_s``).
    """

    phase: TunnelPhase = TunnelPhase.IDLE
    since: float = 0.0
    failures: int = 0
    connects: int = 0
    cause: Cause | None = None
    retry_at: float | None = None
    tried_at: float | None = None
    eager_until: float | None = None
    held: bool = False

    @property
    def reconnects(self) -> int:
        return max(0, self.connects - 1)

    @property
    def waiting(self) -> bool:
        """Whether the tunnel waits for the time of its next attempt."""
        return self.phase in (TunnelPhase.BACKOFF, TunnelPhase.FAILED)


def step(
    life: Lifecycle, event: LifecycleEvent, *, now: float, jitter: float, timing: RetryTiming | None = None
) -> tuple[Lifecycle, Decision]:
    """Returns the state after ``event``, and the decision.

    An event that does not fit the phase, because it came too late, changes nothing. ``now`` is monotonic seconds,
    ``jitter`` a random number in [0, 1).
    """
    timing = timing or RetryTiming()
    if life.phase is TunnelPhase.CLOSED:  # a closed tunnel never opens again
        return life, Decision.STOP
    match event:
        case CloseRequested():
            return replace(life, phase=TunnelPhase.CLOSED, since=now, retry_at=None), Decision.STOP
        case OpenRequested() if life.phase is TunnelPhase.IDLE:
            return _begin_attempt(life, now), Decision.CONNECT
        case Connected() if life.phase is TunnelPhase.CONNECTING:
            return replace(life, phase=TunnelPhase.UP, since=now, connects=life.connects + 1), Decision.NOTHING
        case ConnectionFailed(cause) if life.phase in (TunnelPhase.CONNECTING, TunnelPhase.UP):
            failed = _fail(life, cause, now, jitter, timing)
            return (replace(failed, retry_at=None) if life.held else failed), Decision.WAIT
        case HoldRequested() if life.phase is TunnelPhase.UP:
            return replace(life, held=True), Decision.CUT
        case HoldReleased() if life.held:
            life = replace(life, held=False)
            return (_begin_attempt(life, now), Decision.CONNECT) if life.waiting else (life, Decision.NOTHING)
        case RetryDue() | RepairSeen() | Woke() | NetworkChanged() if life.waiting and life.held:
            return life, Decision.WAIT
        case RetryDue() if life.waiting:
            if life.retry_at is not None and now < life.retry_at:  # the caller's timer went off too early
                return life, Decision.WAIT
            return _begin_attempt(life, now), Decision.CONNECT
        case RetryRequested() | RepairSeen() if life.waiting:
            # The person may have mended the cause: if this attempt fails too, the waits begin with the shortest again.
            return _begin_attempt(replace(life, failures=0, held=False), now), Decision.CONNECT
        case RetryRequested() | Suspected() if life.phase is TunnelPhase.UP:
            return life, Decision.CHECK
        case Woke() | NetworkChanged():
            return _react_to_environment(life, event, now, timing)
    return life, Decision.NOTHING


def _begin_attempt(life: Lifecycle, now: float) -> Lifecycle:
    """The state in which an attempt to connect has just begun."""
    return replace(life, phase=TunnelPhase.CONNECTING, since=now, tried_at=now, retry_at=None)


def _fail(life: Lifecycle, cause: Cause, now: float, jitter: float, timing: RetryTiming) -> Lifecycle:
    """The state after a failure: phase ``failed`` when a person must act, otherwise ``backoff``.

    In phase ``failed`` the interval does not grow, because a person may mend the cause at any time. In ``backoff`` it
    grows with the failures, and stays short for some time after a wake or a network change.
    """
    if cause.needs_person:
        phase = TunnelPhase.FAILED
        failures = life.failures + 1
        delay_s = timing.failed_retry_s * (0.9 + 0.2 * jitter)  # spread by 10 % either way
    else:
        phase = TunnelPhase.BACKOFF
        was_stable = life.phase is TunnelPhase.UP and now - life.since >= timing.stable_s
        failures = 0 if was_stable else life.failures + 1  # 0: the next attempt comes at once
        is_eager = life.eager_until is not None and now < life.eager_until
        max_backoff_s = timing.eager_max_backoff_s if is_eager else timing.max_backoff_s
        delay_s = backoff_delay_s(
            failures,
            jitter,
            initial_backoff_s=timing.initial_backoff_s,
            max_backoff_s=max_backoff_s,
            immediate_retry_s=timing.immediate_retry_s,
        )
    return replace(life, phase=phase, since=now, failures=failures, cause=cause, retry_at=now + delay_s)


def _react_to_environment(
    life: Lifecycle, event: Woke | NetworkChanged, now: float, timing: RetryTiming
) -> tuple[Lifecycle, Decision]:
    """The step for a wake from sleep, or for a change of the network: returns the new state and the decision.

    A tunnel that is up is checked. A tunnel that waits is tried at once, or a moment later if a change of the network
    has just started an attempt. An attempt under way is given up after a wake only.
    """
    if life.phase is TunnelPhase.IDLE:  # the tunnel is not wanted yet
        return life, Decision.NOTHING
    life = replace(life, eager_until=now + timing.eager_period_s)
    if life.phase is TunnelPhase.UP:
        return life, Decision.CHECK
    life = replace(life, failures=0)  # the earlier failures say nothing about the new situation
    if life.phase is TunnelPhase.CONNECTING:
        if isinstance(event, Woke):  # the attempt under way is most likely dead
            return _begin_attempt(life, now), Decision.RECONNECT
        return life, Decision.NOTHING  # the attempt may survive a change of the network; if not, it fails by itself
    # From here on the tunnel waits, in phase backoff or failed.
    if isinstance(event, NetworkChanged) and life.tried_at is not None:  # a tunnel that waits was tried before
        # Changes come in bursts (link, address, route). The first change started an attempt; the next attempt comes
        # when the burst is over.
        settled_at = life.tried_at + timing.network_settle_s
        if now < settled_at:
            retry_at = settled_at if life.retry_at is None else min(life.retry_at, settled_at)
            return replace(life, retry_at=retry_at), Decision.WAIT
    return _begin_attempt(life, now), Decision.CONNECT


def describe_life(life: Lifecycle, rtt_ms: float | None, *, now: float) -> TunnelState:
    """The part of the visible state that the lifecycle decides. ``rtt_ms``: the last round trip. Pure."""
    # While the tunnel is up, the last error stays, to explain the last reconnect. Its code and hint ask a person to
    # act, so they do not stay.
    up, cause = life.phase is TunnelPhase.UP, life.cause
    return TunnelState(
        transport="",
        state=life.phase,
        rtt_ms=rtt_ms if up else None,
        reconnects=life.reconnects,
        last_error=cause.message if cause else None,
        error_code=cause.code if cause and not up else None,
        hint=cause.hint if cause and not up else None,
        retry_in_s=max(0.0, life.retry_at - now) if life.retry_at is not None else None,
    )
