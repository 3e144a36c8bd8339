"""``SupervisedPool``: one pool of mesh.yaml. It starts its parts, ends them as one, and starts them again.

lifecycle.py decides when; ``RunPool`` does what a start needs. This file joins the two.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from random import Random
from typing import Protocol

from gpumesh.errors import GPUMeshError, PoolDoesNotFit, PoolError, PoolFailed, TunnelError
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPhase, PoolPlan, PoolState
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
from gpumesh.pools.running.progress import PoolProgress
from gpumesh.text.quoting import paste_command

log = logging.getLogger(__name__)

LOST_AFTER = 2  # a member that has failed so often in a row is left out, if the model fits without it
DOUBTED_FAILURES = 3
# Failures that need a person, but not right after another failure: the memory and ports of programs that were killed
# are free a moment later.
_MAY_PASS = frozenset({PoolDoesNotFit.code, "reverse-forward-refused"})


class PoolRun(Protocol):
    """What a start of a pool reports."""

    @property
    def progress(self) -> PoolProgress: ...

    def note_planned(self, plan: PoolPlan) -> None:
        """There is a plan that fits."""

    def note_loading(self) -> None:
        """The workers run, and llama-server loads the model."""

    def note_ready(self) -> None:
        """llama-server answers, and its report equals the plan."""

    def note_failed(self, error: GPUMeshError) -> None:
        """The start failed, or a part did. All parts are being ended."""


class RunPool(Protocol):
    """Starts all parts of a pool and watches them, until one fails or the call is cancelled. When the call ends, all
    parts have ended. ``lost``: the members to do without if the model fits without them. Raises GPUMeshError."""

    async def __call__(self, spec: PoolSpec, run: PoolRun, lost: frozenset[str]) -> None: ...


class SupervisedPool:
    """``run`` runs as long as the pool is in mesh.yaml. ``clock`` returns monotonic seconds, ``rng`` spreads the
    restarts, ``on_change`` is called after each change of the state."""

    def __init__(
        self,
        spec: PoolSpec,
        run_pool: RunPool,
        *,
        clock: Callable[[], float],
        rng: Random,
        on_change: Callable[[], None],
        timing: RestartTiming | None = None,
    ) -> None:
        self.spec = spec
        """What the next start runs; ``changed_spec`` replaces it then."""
        self.changed_spec: PoolSpec | None = None
        self._run_pool = run_pool
        self._clock = clock
        self._rng = rng
        self._on_change = on_change
        self._timing = timing or RestartTiming()
        self.progress = PoolProgress(clock, on_change)
        self.life = PoolLife()
        self._since: datetime | None = None
        self._blamed: Counter[str] = Counter()  # how often each member has failed in the present row of failures
        self._is_unwinding = False  # a start that has failed ends its own parts, and must not be cancelled then
        self._stepped = asyncio.Event()

    def __repr__(self) -> str:
        return f"<SupervisedPool {self.spec.name} {self.life.phase.upper()} {self.life.starts} starts>"

    # -- what others see and ask for -----------------------------------------------------------------------------

    def state(self) -> PoolState:
        life, cause = self.life, self.life.cause
        reason, hint = (None, None) if cause is None else (cause.message, cause.hint)
        if self.changed_spec is not None and life.has_parts:
            reason = reason or "mesh.yaml has changed this pool since it was started"
            hint = (
                hint or paste_command("gpumesh pool up {POOL}", POOL=self.spec.name) + " starts it as the file says now"
            )
        state = PoolState(
            pool=self.spec.name,
            model=self.spec.served_name,
            phase=life.phase,
            since=self._since,
            reason=reason,
            hint=hint,
            starts=life.starts,
            retry_in_s=None if life.retry_at is None else max(0.0, life.retry_at - self._clock()),
        )
        return self.progress.fill(state)

    def request_start(self) -> None:
        """Wants the pool to run, as mesh.yaml says it now: a running pool of another spec is started anew."""
        if self.changed_spec is not None and self.life.has_parts:
            self._step(StopRequested())
        self._step(StartRequested())

    def request_stop(self) -> None:
        self._step(StopRequested())

    def note_moved_members(self) -> None:
        """The addresses of members have changed in mesh.yaml. A pool that runs goes on where it is."""
        if self.life.has_parts and self.changed_spec is None:
            self.changed_spec = self.spec

    def take_over(self, spec: PoolSpec) -> None:
        """Takes over what mesh.yaml says now. A pool that runs goes on as it is. A pool that waits for its next start
        is started at once: a person may have mended the cause in the file."""
        if spec == (self.changed_spec or self.spec):
            return
        if spec == self.spec:
            self.changed_spec = None
        elif self.life.has_parts:
            self.changed_spec = spec
        else:
            self.spec = spec
            if self.life.wanted:
                self._step(StartRequested())

    def note_tunnel_up(self, node: str) -> None:
        """The tunnel of ``node`` has come up. If it is a member, a failed pool is tried again, with it."""
        if node in {member.node for member in self.spec.members}:
            del self._blamed[node]
            self._step(MemberCameBack())

    # -- a start reports -----------------------------------------------------------------------------------------

    def note_planned(self, plan: PoolPlan) -> None:
        self.progress.set_plan(plan)
        self._step(Planned())

    def note_loading(self) -> None:
        self._step(LoadBegan())

    def note_ready(self) -> None:
        self._step(BecameReady())

    def note_failed(self, error: GPUMeshError) -> None:
        if self._is_unwinding:  # what fails now is a consequence
            return
        self._is_unwinding = True
        cause = _cause_of(error)
        if cause.code in _MAY_PASS and self._follows_failure and not cause.unreachable:
            cause = replace(cause, needs_person=False)
        if cause.lost_node is not None:
            self._blamed[cause.lost_node] += 1
            self.progress.set_problem(cause.lost_node, cause.message)
        self._step(PartFailed(cause))

    @property
    def _follows_failure(self) -> bool:
        """Whether the present start is one of the first after a failure: memory and ports may not be free again."""
        return self.life.cause is not None and self.life.failures <= DOUBTED_FAILURES

    # -- running -------------------------------------------------------------------------------------------------

    def _step(self, event: PoolEvent) -> None:
        before = self.life
        self.life = step(before, event, now=self._clock(), jitter=self._rng.random(), timing=self._timing)
        if self.life == before:
            return
        if self.life.phase is not before.phase:
            self._since = datetime.now(UTC)
            self._log_phase()
        stepped, self._stepped = self._stepped, asyncio.Event()
        stepped.set()
        self._on_change()

    def _log_phase(self) -> None:
        life = self.life
        is_failure = life.phase in (PoolPhase.BACKOFF, PoolPhase.FAILED) and life.cause is not None
        reason = f": {life.cause.message}" if is_failure and life.cause is not None else ""
        level = logging.WARNING if is_failure else logging.INFO
        log.log(level, "pool %s: %s%s", self.spec.name, life.phase, reason, extra={"event": "pool"})

    async def run(self) -> None:
        """Starts, ends and restarts the pool as its life decides, until cancelled."""
        while True:
            if self.life.must_start:
                await self._run_once()
            elif self.life.must_end:  # it was stopped before its start had begun
                self._step(Ended())
            elif self.life.phase is PoolPhase.BACKOFF and self.life.retry_at is not None:
                try:
                    async with asyncio.timeout(max(0.0, self.life.retry_at - self._clock())):
                        await self._stepped.wait()
                except TimeoutError:
                    self._step(RetryDue())
            else:
                await self._stepped.wait()

    async def _run_once(self) -> None:
        """Runs one start of the pool until all its parts have ended."""
        self._adopt_changed_spec()
        self.progress.clear()
        self._is_unwinding = False
        if self.life.failures == 0:
            self._blamed.clear()
        async with asyncio.TaskGroup() as group:
            start = group.create_task(self._start(), name=f"pool {self.spec.name}")
            stop = group.create_task(self._cancel_when_unwanted(start))
            await asyncio.wait({start})
            stop.cancel()
        if not self.life.wanted:
            self.progress.clear()
        self._adopt_changed_spec()
        self._step(Ended())

    def _adopt_changed_spec(self) -> None:
        if self.changed_spec is not None:
            self.spec, self.changed_spec = self.changed_spec, None

    async def _start(self) -> None:
        try:
            lost = frozenset(node for node, count in self._blamed.items() if count >= LOST_AFTER)
            await self._run_pool(self.spec, self, lost)
        except GPUMeshError as error:
            self.note_failed(error)
        except Exception as error:  # a bug, or an OSError of this machine: the mesh goes on, and the pool says it
            log.exception("pool %s: a start failed inside", self.spec.name)
            self.note_failed(PoolFailed(f"the pool failed inside: {error!r}", hint="`gpumesh logs` has the details"))
        else:
            self.note_failed(PoolFailed("the pool ended by itself"))

    async def _cancel_when_unwanted(self, start: asyncio.Task[None]) -> None:
        while not (self.life.must_end and not self._is_unwinding):
            await self._stepped.wait()
        start.cancel()


def _cause_of(error: GPUMeshError) -> Cause:
    needs_person = isinstance(error, PoolError | TunnelError) and error.needs_person
    unreachable = error.unreachable if isinstance(error, PoolError) else frozenset[str]()
    return Cause(error.code, error.message, error.hint, needs_person, error.node, unreachable)
