"""A pool's life as a pure state machine: events in, decisions out. No clock, no hosts, no randomness.

::

    stopped ──StartRequested──▶ planning ──Planned──▶ starting ──LoadBegan──▶ loading ──BecameReady──▶ ready
                                   ▲         └───────────┴─────────┬───────────┴──────────────────────────┘
        RetryDue, StartRequested,  │                    PartFailed │ or StopRequested
             MemberCameBack        │                               ▼
                                   └─── backoff, or failed ◀── stopping ──▶ stopped
                                                            Ended

A pool has all its parts or none: after the first failure, all are ended (phase ``stopping``) before anything else is
tried. A failure that may pass leads to ``backoff`` and to the next start. A failure that only a person can mend leads
to ``failed``: the pool is started again when a person asks for it, or when the tunnel of a member comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpumesh.pools.base import PoolPhase
from gpumesh.tunnels.backoff import backoff_delay_s


@dataclass(frozen=True, slots=True)
class RestartTiming:
    """The waits between starts, in seconds. ``initial_backoff_s`` doubles with each failure in a row, up to
    ``max_backoff_s``. A pool that was ready for ``stable_s`` is started again within ``immediate_retry_s``, and its
    earlier failures are forgotten."""

    initial_backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    stable_s: float = 10.0
    immediate_retry_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a pool does not run. ``needs_person``: starting it again cannot help. ``lost_node``: the member that was
    lost; the next plan does without it if the model fits. ``unreachable``: members whose tunnels were down."""

    code: str
    message: str
    hint: str | None = None
    needs_person: bool = False
    lost_node: str | None = None
    unreachable: frozenset[str] = frozenset()


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRequested:
    """A person, or ``autostart``, wants the pool to run."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The pool is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Planned:
    """There is a plan that fits."""


@dataclass(frozen=True, slots=True)
class LoadBegan:
    """The workers run, and llama-server loads the model."""


@dataclass(frozen=True, slots=True)
class BecameReady:
    """llama-server answers, and its report equals the plan."""


@dataclass(frozen=True, slots=True)
class PartFailed:
    """The start failed, or a part of the running pool did."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Ended:
    """All parts of the pool have ended."""


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The moment ``PoolLife.retry_at`` has come."""


@dataclass(frozen=True, slots=True)
class MemberCameBack:
    """The tunnel of a member is up again, so that a failed pool may work now."""


PoolEvent = (
    StartRequested | StopRequested | Planned | LoadBegan | BecameReady | PartFailed | Ended | RetryDue | MemberCameBack
)

# -- the machine -----------------------------------------------------------------------------------------------------

_RUNNING = (PoolPhase.PLANNING, PoolPhase.STARTING, PoolPhase.LOADING, PoolPhase.READY)
_WAITING = (PoolPhase.BACKOFF, PoolPhase.FAILED)


@dataclass(frozen=True, slots=True)
class PoolLife:
    """The state of a pool. ``wanted``: it is to run, now or after the next start. ``failures`` counts the failures in a
    row, ``starts`` the starts since the pool was wanted. ``since``: when the phase began. ``cause``: of the last
    failure, until the pool is ready again. ``retry_at``: the time of the next start, in phase backoff. ``asked_again``:
    a person has asked for a start while the parts were being ended, so that the next start comes at once."""

    phase: PoolPhase = PoolPhase.STOPPED
    wanted: bool = False
    since: float = 0.0
    ready_since: float | None = None
    failures: int = 0
    starts: int = 0
    cause: Cause | None = None
    retry_at: float | None = None
    asked_again: bool = False

    @property
    def has_parts(self) -> bool:
        """Whether something of the pool may run on its hosts."""
        return self.phase in _RUNNING or self.phase is PoolPhase.STOPPING

    @property
    def must_start(self) -> bool:
        """Whether a start is due that has not begun to plan."""
        return self.phase is PoolPhase.PLANNING

    @property
    def must_end(self) -> bool:
        """Whether the parts that run must be ended now."""
        return self.phase is PoolPhase.STOPPING


def step(
    life: PoolLife, event: PoolEvent, *, now: float, jitter: float, timing: RestartTiming | None = None
) -> PoolLife:
    """Returns the state after ``event``. An event that does not fit the phase, because it came too late, changes
    nothing. ``now`` is monotonic seconds, ``jitter`` a random number in [0, 1)."""
    timing = timing or RestartTiming()
    match event:
        case StartRequested():
            return _want(life, now)
        case StopRequested():
            return _unwant(life, now)
        case Planned() if life.phase is PoolPhase.PLANNING:
            return replace(life, phase=PoolPhase.STARTING, since=now)
        case LoadBegan() if life.phase is PoolPhase.STARTING:
            return replace(life, phase=PoolPhase.LOADING, since=now)
        case BecameReady() if life.phase is PoolPhase.LOADING:
            return replace(life, phase=PoolPhase.READY, since=now, ready_since=now, cause=None)
        case PartFailed(cause) if life.phase in _RUNNING:
            return replace(life, phase=PoolPhase.STOPPING, since=now, cause=cause)
        case Ended() if life.phase is PoolPhase.STOPPING:
            return _after_end(life, now, jitter, timing)
        case RetryDue() if life.phase is PoolPhase.BACKOFF:
            if life.retry_at is not None and now < life.retry_at:  # the caller's timer went off too early
                return life
            return _begin(life, now)
        case MemberCameBack() if life.phase in _WAITING:
            return _begin(life, now)
    return life


def _begin(life: PoolLife, now: float) -> PoolLife:
    """The state in which a start has just begun."""
    starts = life.starts + 1
    return replace(life, phase=PoolPhase.PLANNING, since=now, starts=starts, retry_at=None, asked_again=False)


def _want(life: PoolLife, now: float) -> PoolLife:
    if life.phase is PoolPhase.STOPPED:
        return _begin(replace(life, wanted=True, failures=0, starts=0, cause=None), now)
    if life.phase in _WAITING:  # a person may have mended the cause: the waits begin with the shortest again
        return _begin(replace(life, wanted=True, failures=0, cause=None), now)
    if life.phase is PoolPhase.STOPPING and life.wanted:
        return replace(life, asked_again=True)
    if life.phase is PoolPhase.STOPPING:  # it is started again as soon as it has ended
        return replace(life, wanted=True, failures=0, starts=0, asked_again=True)
    return life


def _unwant(life: PoolLife, now: float) -> PoolLife:
    life = replace(life, wanted=False, asked_again=False, cause=None)
    if life.phase in _RUNNING:
        return replace(life, phase=PoolPhase.STOPPING, since=now)
    if life.phase in _WAITING:
        return replace(life, phase=PoolPhase.STOPPED, since=now, retry_at=None)
    return life


def _after_end(life: PoolLife, now: float, jitter: float, timing: RestartTiming) -> PoolLife:
    """The state after all parts have ended: what follows depends on whether the pool is wanted, and on the cause."""
    ready_since, life = life.ready_since, replace(life, since=now, ready_since=None)
    if not life.wanted:
        return replace(life, phase=PoolPhase.STOPPED, cause=None)
    if life.asked_again:  # a person may have mended the cause
        return _begin(replace(life, failures=0, cause=None), now)
    assert life.cause is not None, "a wanted pool ends because a part has failed"
    if life.cause.needs_person:
        return replace(life, phase=PoolPhase.FAILED, failures=life.failures + 1)
    was_stable = ready_since is not None and now - ready_since >= timing.stable_s
    failures = 0 if was_stable else life.failures + 1
    delay_s = backoff_delay_s(
        failures,
        jitter,
        initial_backoff_s=timing.initial_backoff_s,
        max_backoff_s=timing.max_backoff_s,
        immediate_retry_s=timing.immediate_retry_s,
    )
    return replace(life, phase=PoolPhase.BACKOFF, failures=failures, retry_at=now + delay_s)
