"""``StartTurns``: pools that share a node are started one after the other.

Each plan takes the memory that is free on the hosts at that moment. If two pools looked at a GPU at the same time, both
would count on the same memory, and llama.cpp would find too little of it in the middle of a load.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from gpumesh.errors import GPUMeshError
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan
from gpumesh.pools.running.pool import PoolRun, RunPool
from gpumesh.pools.running.progress import PoolProgress


class StartTurns:
    """Calls ``run_pool`` when no other pool is being started on the nodes of the pool. Its ``run`` is a ``RunPool``."""

    def __init__(self, run_pool: RunPool) -> None:
        self._run_pool = run_pool
        self._locks: dict[str, asyncio.Lock] = {}
        self._starting: dict[str, str] = {}  # the pool that is being started on a node

    def __repr__(self) -> str:
        return f"<StartTurns {sorted(set(self._starting.values()))}>"

    async def run(self, spec: PoolSpec, run: PoolRun, lost: frozenset[str]) -> None:
        """As ``RunPool``."""
        with ExitStack() as turn:
            nodes = sorted(member.node for member in spec.members)  # one order for all, so that none waits for ever
            for node in nodes:
                lock = self._locks.setdefault(node, asyncio.Lock())
                if lock.locked():
                    run.progress.set_waits_for(f"waits until {self._starting[node]} is ready, which also uses {node}")
                await lock.acquire()
                turn.callback(lock.release)
                self._starting[node] = spec.name
            run.progress.set_waits_for(None)
            await self._run_pool(spec, _Turn(run, turn), lost)


class _Turn:
    """A ``PoolRun`` that lets the next pool start when this one is ready: then it holds all memory that it needs."""

    def __init__(self, run: PoolRun, turn: ExitStack) -> None:
        self._run = run
        self._turn = turn

    @property
    def progress(self) -> PoolProgress:
        return self._run.progress

    def note_planned(self, plan: PoolPlan) -> None:
        self._run.note_planned(plan)

    def note_loading(self) -> None:
        self._run.note_loading()

    def note_ready(self) -> None:
        self._run.note_ready()
        self._turn.close()

    def note_failed(self, error: GPUMeshError) -> None:
        self._run.note_failed(error)
