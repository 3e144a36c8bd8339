"""``PoolProgress``: what is known of a pool besides its phase: its plan, its load, its members and measured speed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gpumesh.pools.base import MemberState, PoolPhase, PoolPlan, PoolState

RATE_WINDOW_S = 5.0  # the rate of a load is that of its last seconds


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """What llama-server has measured on its answers so far; ``None``: nothing yet."""

    tokens_per_s: float | None = None
    draft_acceptance: float | None = None


class PoolProgress:
    """What one start of a pool has reported. ``clock`` returns monotonic seconds; ``on_change`` is called after each
    change."""

    def __init__(self, clock: Callable[[], float], on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._plan: PoolPlan | None = None
        self._planned_at = 0.0
        self._measured: Mapping[str, int] = {}
        self._problems: dict[str, str] = {}
        self._speed = MeasuredSpeed()
        self._waits_for: str | None = None
        self._load_bytes: int | None = None
        self._loaded: deque[tuple[float, int]] = deque()  # the times of the last seconds, and the bytes loaded by then

    def clear(self) -> None:
        """Forgets all: the pool is started anew, or stopped."""
        self._plan, self._measured, self._problems, self._speed = None, {}, {}, MeasuredSpeed()
        self._load_bytes, self._loaded, self._waits_for = None, deque(), None

    def set_waits_for(self, reason: str | None) -> None:
        """Why the start has not begun, in words for people; ``None``: it has."""
        if reason != self._waits_for:
            self._waits_for = reason
            self._on_change()

    def set_plan(self, plan: PoolPlan) -> None:
        self._plan, self._planned_at = plan, self._clock()
        self._on_change()

    def set_loaded(self, loaded_bytes: int, load_bytes: int) -> None:
        """``loaded_bytes`` of ``load_bytes`` have reached the devices."""
        now = self._clock()
        self._load_bytes = load_bytes
        self._loaded.append((now, min(loaded_bytes, load_bytes)))
        while len(self._loaded) > 2 and now - self._loaded[1][0] >= RATE_WINDOW_S:
            self._loaded.popleft()
        self._on_change()

    def set_measured(self, bytes_by_node: Mapping[str, int]) -> None:
        """The bytes that llama-server reports for each member."""
        self._measured = bytes_by_node
        self._loaded.clear()
        self._load_bytes = None
        self._on_change()

    def set_problem(self, node: str, problem: str) -> None:
        self._problems[node] = problem
        self._on_change()

    def set_speed(self, speed: MeasuredSpeed) -> None:
        if speed != self._speed:
            self._speed = speed
            self._on_change()

    def fill(self, state: PoolState) -> PoolState:
        """``state`` with what is known."""
        state = replace(
            state,
            tokens_per_s=self._speed.tokens_per_s,
            draft_acceptance=self._speed.draft_acceptance,
            members=self._member_states(),
            predicted=None if self._plan is None else self._plan.speed,
            reason=self._waits_for or state.reason,
        )
        if not self._loaded or self._load_bytes is None:
            return replace(state, left_s=self._forecast_left_s()) if state.phase is PoolPhase.LOADING else state
        loaded_bytes = self._loaded[-1][1]
        rate = self._rate()
        left_s = (self._load_bytes - loaded_bytes) / rate if rate else None
        return replace(
            state,
            loaded_bytes=loaded_bytes,
            load_bytes=self._load_bytes,
            load_bytes_per_s=rate,
            left_s=left_s,
        )

    def _forecast_left_s(self) -> float | None:
        """The rest of the time that the plan gives the start; ``None`` if it gives none, or if that is over."""
        if self._plan is None or self._plan.load_s is None:
            return None
        left_s = self._plan.load_s - (self._clock() - self._planned_at)
        return left_s if left_s > 0 else None

    def _rate(self) -> float | None:
        """The bytes per second of the last seconds; ``None`` while it is not known."""
        (since, before), (until, after) = self._loaded[0], self._loaded[-1]
        return (after - before) / (until - since) if until > since and after > before else None

    def _member_states(self) -> tuple[MemberState, ...]:
        if self._plan is None:
            return ()
        return tuple(
            MemberState(
                member.node,
                member.is_head,
                member.layers,
                sum(share.needed_bytes for share in member.shares),
                self._measured.get(member.node),
                member.path,
                self._problems.get(member.node),
            )
            for member in self._plan.members
        )
