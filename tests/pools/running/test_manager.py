"""The pools of a mesh: started, stopped and restarted. Their parts are played by a function that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from gpumesh.errors import GPUMeshError, PoolDoesNotFit, PoolFailed, UsageError
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import KvType, PoolMember, PoolSpec
from gpumesh.pools.base import ModelShape, PoolPhase, PoolPlan, PoolState
from gpumesh.pools.running.lifecycle import RestartTiming
from gpumesh.pools.running.manager import PoolManager
from gpumesh.pools.running.pool import PoolRun
from gpumesh.state import Finding
from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Target, Topology

SHAPE = ModelShape("llama", "tiny", "F16", (100, 100), 50, 50, (64, 64), 32, 256, 4, 2048, 1000, 320)
BIG = PoolSpec("big", "~/big.gguf", (PoolMember("a"), PoolMember("b")), "a")
TIMING = RestartTiming(initial_backoff_s=0.001, max_backoff_s=0.002)


@dataclass
class Parts:
    """The parts of a pool. ``failure`` fails the next starts; ``breaks`` ends a pool that is ready, with an error."""

    failure: GPUMeshError | None = None
    breaks: asyncio.Queue[GPUMeshError] = field(default_factory=asyncio.Queue)
    running: set[str] = field(default_factory=set)
    starts: list[tuple[PoolSpec, frozenset[str]]] = field(default_factory=list)

    async def run(self, spec: PoolSpec, run: PoolRun, lost: frozenset[str]) -> None:
        assert spec.name not in self.running, "the parts of the start before have not ended"
        self.running.add(spec.name)
        self.starts.append((spec, lost))
        try:
            if self.failure is not None:
                raise self.failure
            run.note_planned(PoolPlan(spec.name, spec.model, SHAPE, (), spec.context, 1, KvType.F16))
            run.note_loading()
            run.note_ready()
            error = await self.breaks.get()
            run.note_failed(error)
            await asyncio.sleep(0)  # all parts end
            raise error
        finally:
            try:
                await asyncio.sleep(0)
            finally:
                self.running.remove(spec.name)


@dataclass
class Running:
    mesh: Mesh
    parts: Parts
    manager: PoolManager
    findings: list[tuple[Finding, ...]]

    async def start(self, name: str = "big") -> list[PoolState]:
        async with aclosing(self.manager.start(name)) as states:
            return [state async for state in states]

    async def wait(self, phase: PoolPhase) -> PoolState:
        while self.manager.states()[0].phase is not phase:
            await asyncio.sleep(0.002)
        return self.manager.states()[0]

    def reload(self, *pools: PoolSpec) -> None:
        self.mesh.apply(replace(self.mesh.file_topology, pools=pools), limit_s=1.0)
        self.manager.follow_file()


@asynccontextmanager
async def running(*pools: PoolSpec, target: Target | None = None) -> AsyncIterator[Running]:
    """``target``: where the servers of the nodes are; ``None``: the nodes are disabled."""
    backend = BackendSpec(targets=(target or Target("127.0.0.1", 9),))
    nodes = tuple(NodeSpec(name, backend, enabled=target is not None) for name in "ab")
    parts, findings = Parts(), list[tuple[Finding, ...]]()
    async with asyncio.timeout(20), Mesh(Topology("home", nodes, pools=pools)) as mesh:
        manager = PoolManager(mesh, parts.run, on_findings=findings.append, timing=TIMING)
        task = asyncio.create_task(manager.run())
        await asyncio.sleep(0)
        yield Running(mesh, parts, manager, findings)
        task.cancel()
        await asyncio.wait({task})
        assert not parts.running, "a pool outlived its manager"


async def test_a_pool_starts_and_stops_when_asked() -> None:
    async with running(BIG) as home:
        assert (await home.wait(PoolPhase.STOPPED)).model == "big"
        states = await home.start()
        assert states[-1].phase is PoolPhase.READY
        assert [state.phase for state in await home.start()] == [PoolPhase.READY]  # it stays as it is
        await home.manager.stop("big")
        assert not home.parts.running
        assert (await home.wait(PoolPhase.STOPPED)).starts == 1
        with pytest.raises(UsageError, match="no pool 'small'"):
            await home.manager.stop("small")


async def test_a_part_that_fails_ends_all_and_the_pool_is_started_again_without_the_lost_node() -> None:
    async with running(replace(BIG, autostart=True)) as home:
        await home.wait(PoolPhase.READY)
        for starts in (2, 3):
            home.parts.breaks.put_nowait(PoolFailed("the worker on b has ended", node="b"))
            while len(home.parts.starts) < starts:
                await asyncio.sleep(0.002)
            assert (await home.wait(PoolPhase.READY)).starts == starts
        assert [lost for _, lost in home.parts.starts] == [frozenset(), frozenset(), frozenset({"b"})]


async def test_what_a_person_must_mend_is_an_error_and_a_finding_with_its_hint() -> None:
    async with running(BIG) as home:
        home.parts.failure = PoolDoesNotFit("2.0 GiB are missing", hint="a context of 2048 fits")
        with pytest.raises(PoolDoesNotFit, match=r"pool big: 2\.0 GiB are missing") as caught:
            await home.start()
        assert caught.value.hint == "a context of 2048 fits"
        while not home.findings:
            await asyncio.sleep(0.01)
        (finding,) = home.findings[-1]
        assert (finding.code, finding.hint) == ("pool-down", "a context of 2048 fits")
        home.parts.failure = None
        assert (await home.start())[-1].phase is PoolPhase.READY
        while home.findings[-1]:
            await asyncio.sleep(0.01)


async def test_who_stops_waiting_for_a_start_stops_it() -> None:
    async with running(BIG) as home:
        home.parts.failure = PoolFailed("the worker on b has ended")
        async with aclosing(home.manager.start("big")) as states:
            async for _ in states:
                break
        await home.wait(PoolPhase.STOPPED)


async def test_a_bug_in_a_start_leaves_the_mesh_alone() -> None:
    async with running(replace(BIG, autostart=True)) as home:
        await home.wait(PoolPhase.READY)
        home.parts.failure = ZeroDivisionError("inside")  # type: ignore[assignment]
        home.parts.breaks.put_nowait(PoolFailed("ended"))
        while "inside" not in (home.manager.states()[0].reason or ""):
            await asyncio.sleep(0.002)


async def test_a_reload_keeps_a_changed_pool_running_until_it_is_asked_for_and_ends_a_removed_one() -> None:
    async with running(BIG) as home:
        await home.start()
        longer = replace(BIG, context=8192)
        home.reload(longer, replace(BIG, name="other"))
        state = await home.wait(PoolPhase.READY)
        assert state.reason is not None
        assert "changed" in state.reason
        assert len(home.parts.starts) == 1
        assert (await home.start())[-1].phase is PoolPhase.READY
        assert home.parts.starts[-1][0] == longer
        home.reload(replace(BIG, name="other"))
        while home.parts.running:
            await asyncio.sleep(0.002)
        assert [pool.pool for pool in home.manager.states()] == ["other"]


async def test_a_pool_whose_member_has_moved_says_so_and_is_started_there_when_asked() -> None:
    async with running(BIG) as home:
        await home.start()
        a, b = home.mesh.file_topology.nodes
        home.mesh.apply(replace(home.mesh.file_topology, nodes=(a, replace(b, ssh=SshSpec("other")))), limit_s=1.0)
        home.manager.follow_file()
        assert "changed" in str((await home.wait(PoolPhase.READY)).reason)
        home.manager.follow_file()
        assert (await home.start())[-1].reason is None
        assert len(home.parts.starts) == 2


async def test_a_pool_that_lacks_a_member_starts_when_its_tunnel_comes_up() -> None:
    listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    await listening.wait_closed()
    async with running(BIG, target=Target("127.0.0.1", port)) as home:
        lacking = PoolDoesNotFit("b cannot take part")
        lacking.unreachable = frozenset({"b"})
        home.parts.failure = lacking
        with pytest.raises(PoolDoesNotFit):
            await home.start()
        home.parts.failure = None
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port):
            await home.wait(PoolPhase.READY)


async def test_a_file_that_mends_a_pool_starts_it() -> None:
    async with running(BIG) as home:
        home.parts.failure = PoolDoesNotFit("2.0 GiB are missing")
        with pytest.raises(PoolDoesNotFit):
            await home.start()
        home.parts.failure = None
        home.reload(replace(BIG, context=1024))
        await home.wait(PoolPhase.READY)
