from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.backends.base import Message
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import (
    AuthRefused,
    ConnectRefused,
    MeshNotRunning,
    PoolMemberUnusable,
    PoolModelMissing,
    UsageError,
)
from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN_7B, Faults
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.state import Health, TunnelPhase
from gpumesh.tunnels.base import OutputStream
from tests.cli.meshes import SimulatedMesh, isolated_command, quick_host, simulated_mesh

ASK = PromptRequest((Message("user", "hello"),), options={"num_predict": 2})


@asynccontextmanager
async def session_of(made: SimulatedMesh) -> AsyncIterator[LocalSession]:
    async with asyncio.timeout(50), Mesh(config.load(made.gpumesh.config)) as mesh:
        yield LocalSession(mesh)


@pytest.fixture
async def direct(tmp_path: Path) -> AsyncIterator[SimulatedMesh]:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False), quick_host("beta", ssh=False)) as made:
            yield made


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[SimulatedMesh]:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(gpumesh, quick_host("alpha")) as made:
            yield made


async def said(session: LocalSession, ask: PromptRequest) -> str:
    async with session.chat(ask) as stream:
        return "".join([chunk.text async for chunk in stream])


async def test_a_prompt_waits_for_the_first_node_that_can_take_it(direct: SimulatedMesh) -> None:
    async with session_of(direct) as session:
        assert await said(session, ASK)
        assert await said(session, PromptRequest(ASK.messages, node="beta", options=ASK.options))
        with pytest.raises(UsageError, match="no node 'gamma'"):
            await said(session, PromptRequest(ASK.messages, node="gamma"))


async def test_a_prompt_waits_for_a_node_that_reconnects(one: SimulatedMesh) -> None:
    async with session_of(one) as session:
        assert await said(session, ASK)
        await one.hosts["alpha"].drop_connections()
        async for state in session.watch(0.01):
            if state.node("alpha").tunnel.state is TunnelPhase.BACKOFF:
                break
        assert await said(session, ASK), "it was up a moment ago"


async def test_without_a_default_the_only_chat_model_is_meant(tmp_path: Path) -> None:
    with isolated_command(tmp_path) as gpumesh:
        async with simulated_mesh(
            gpumesh,
            quick_host("alpha", ssh=False, models=(EMBEDDER, QWEN_7B)),
            quick_host("beta", ssh=False, models=(QWEN_7B, LLAMA_8B)),
        ) as made:
            made.write(default_model=None)
            async with session_of(made) as session:
                assert await said(session, PromptRequest(ASK.messages, node="alpha", options=ASK.options))
                with pytest.raises(UsageError, match="which model"):
                    await said(session, ASK)


async def test_a_mesh_that_stops_takes_no_new_prompts(direct: SimulatedMesh) -> None:
    async with session_of(direct) as session:
        async with session.chat(ASK) as stream:
            session.refuse_new_prompts()
            assert [chunk async for chunk in stream]
        with pytest.raises(MeshNotRunning, match="is stopping"):
            await said(session, ASK)


async def test_drain_resume_and_watch(direct: SimulatedMesh) -> None:
    async with session_of(direct) as session:
        await session.wait_first_report(20)
        assert repr(session) == f"<LocalSession {session.mesh.topology.name} RUNNING 2 nodes>"
        await session.drain("alpha")
        assert (await session.status()).node("alpha").health is Health.DRAINING
        await session.resume("alpha")
        seen = []
        async for state in session.watch(0.01):
            seen.append(state.node("alpha").health)
            if len(seen) == 3:
                break
        assert seen[0] is not Health.DRAINING
        for act in (session.drain, session.resume, session.reconnect):
            with pytest.raises(UsageError, match="no node 'gamma'"):
                await act("gamma")


async def test_history_holds_what_was_recorded(direct: SimulatedMesh) -> None:
    async with session_of(direct) as session:
        assert (await session.history()).nodes == ()
        session.recorder.add(await session.wait_first_report(20))
        assert await said(session, ASK)
        session.recorder.add(await session.status())
        assert [series.key for series in (await session.history()).nodes][:1]


async def test_exec_opens_no_shell_of_its_own(one: SimulatedMesh) -> None:
    async with session_of(one) as session:
        chunks = [chunk async for chunk in session.exec("alpha", ("hostname",))]
        assert b"".join(chunk.data for chunk in chunks if chunk.stream is OutputStream.STDOUT).strip()
        assert (chunks[-1].ended, chunks[-1].exit_status) == (True, 0)


async def test_exec_on_a_host_that_refuses_says_why_at_once(one: SimulatedMesh) -> None:
    await one.hosts["alpha"].set_faults(Faults(ssh_refuse_key=True))
    async with session_of(one) as session:
        for _ in range(2):  # while it opens for the first time, and when it has failed already
            began = time.monotonic()
            with pytest.raises(AuthRefused, match="refuses the login") as caught:
                _ = [chunk async for chunk in session.exec("alpha", ("hostname",))]
            assert caught.value.hint
            assert caught.value.node == "alpha"
            assert time.monotonic() - began < 9, "every command answers within 10 s"
        await one.hosts["alpha"].set_faults(Faults())
        assert [chunk async for chunk in session.exec("alpha", ("hostname",))], "a waiting tunnel tries at once"


async def test_exec_where_nobody_listens(one: SimulatedMesh) -> None:
    node = one.node("alpha")
    node["ssh"]["port"] = 9
    one.write([node])
    async with session_of(one) as session:
        with pytest.raises(ConnectRefused, match="nothing listens"):
            _ = [chunk async for chunk in session.exec("alpha", ("hostname",))]


async def test_reconnect_connects_at_once(one: SimulatedMesh) -> None:
    await one.hosts["alpha"].set_faults(Faults(ssh_refuse_key=True))
    async with session_of(one) as session:
        async for state in session.watch(0.02):
            if state.node("alpha").tunnel.state is TunnelPhase.FAILED:
                break
        await one.hosts["alpha"].set_faults(Faults())
        async for state in session.watch(0.02):  # for less time than a failed tunnel waits by itself
            if state.node("alpha").health is Health.HEALTHY:
                break
            # Again, if it fails again: a change of this machine's network may have begun an attempt before the mend.
            if state.node("alpha").tunnel.state is TunnelPhase.FAILED:
                await session.reconnect("alpha")


async def test_a_mesh_of_one_command_plans_pools_and_starts_none(direct: SimulatedMesh, tmp_path: Path) -> None:
    async with session_of(direct) as session:
        assert await session.pools() == ()
        with pytest.raises(MeshNotRunning, match="in the background"):
            _ = [state async for state in session.start_pool("big")]
        with pytest.raises(MeshNotRunning):
            await session.stop_pool("big")
        spec = PoolSpec("big", str(tmp_path / "none.gguf"), (PoolMember("alpha"), PoolMember("beta")), "alpha")
        with pytest.raises(PoolModelMissing, match=r"there is no file .*none\.gguf on alpha"):
            await session.plan_pool(spec)
        with pytest.raises(PoolMemberUnusable, match="gamma is not in the running mesh"):
            await session.plan_pool(PoolSpec("big", "m", (PoolMember("gamma"),), "gamma"))
