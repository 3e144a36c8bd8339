"""Pools that share a node are started one after the other; other pools at the same time."""

from __future__ import annotations

import asyncio
from random import Random

from gpumesh.errors import PoolFailed
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import PoolPhase
from gpumesh.pools.running.pool import PoolRun, SupervisedPool
from gpumesh.pools.running.turns import StartTurns


def make_spec(name: str, *nodes: str) -> PoolSpec:
    return PoolSpec(name, "~/big.gguf", tuple(PoolMember(node) for node in nodes), nodes[0])


class Starts:
    """Starts of pools that are ready, or fail, when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ready = {name: asyncio.Event() for name in ("first", "second", "other")}
        self.fails: set[str] = set()

    async def run(self, spec: PoolSpec, run: PoolRun, lost: frozenset[str]) -> None:
        self.begun.append(spec.name)
        await self.ready[spec.name].wait()
        if spec.name in self.fails:
            raise PoolFailed("as the test wants it")
        run.note_ready()
        await asyncio.Event().wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_pool_waits_until_another_one_on_its_nodes_is_ready_or_has_failed() -> None:
    for fails in (False, True):
        starts = Starts()
        starts.fails = {"first"} if fails else set()
        turns = StartTurns(starts.run)
        specs = (make_spec("first", "a", "b"), make_spec("second", "c", "b"), make_spec("other", "d"))
        pools = [
            SupervisedPool(spec, turns.run, clock=lambda: 0.0, rng=Random(1), on_change=lambda: None) for spec in specs
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(pool.run()) for pool in pools]
            for pool in pools:
                pool.request_start()
            await settle()
            assert starts.begun == ["first", "other"]
            waiting = pools[1].state()
            assert waiting.phase is PoolPhase.PLANNING
            assert waiting.reason == "waits until first is ready, which also uses b"
            starts.ready["first"].set()
            await settle()
            assert starts.begun == ["first", "other", "second"]
            assert pools[1].state().reason is None
            for task in tasks:
                task.cancel()


async def test_a_pool_that_is_stopped_while_it_waits_does_not_hold_up_others() -> None:
    starts = Starts()
    turns = StartTurns(starts.run)
    specs = (make_spec("first", "b"), make_spec("second", "a", "b"), make_spec("other", "a"))
    pools = [
        SupervisedPool(spec, turns.run, clock=lambda: 0.0, rng=Random(1), on_change=lambda: None) for spec in specs
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pool.run()) for pool in pools]
        for pool in pools:
            pool.request_start()
            await settle()
        assert starts.begun == ["first"]
        pools[1].request_stop()
        await settle()
        assert starts.begun == ["first", "other"]
        for task in tasks:
            task.cancel()
