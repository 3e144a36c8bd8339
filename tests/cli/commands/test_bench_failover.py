"""A node that `bench` took out of service is put back by the running mesh, however `bench` ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.state import Health
from tests.cli.meshes import SimulatedMesh, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]

LONG = ("bench", "run", "--scenario", "failover", "-n", "24", "--tokens", "100", "-c", "2", "--out", "r", "--force")


@pytest.fixture
async def mixed(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """``far`` is reached by SSH, ``near`` is not: its commands run on this machine."""
    async with simulated_mesh(gpumesh, quick_host("far"), quick_host("near", ssh=False)) as made:
        yield made


async def wait_health(session: RemoteSession, node: str, *healths: Health) -> None:
    async with asyncio.timeout(30), aclosing(session.watch(0.02)) as states:
        async for state in states:
            if state.node(node).health in healths:
                return
    raise AssertionError("the mesh has ended")


async def test_a_node_is_back_however_bench_ends(mixed: SimulatedMesh, tmp_path: Path) -> None:
    gpumesh, marks = mixed.gpumesh, tmp_path / "marks"
    await gpumesh("up", "-d")
    (socket,) = gpumesh.runtime.rglob("*.sock")
    session = RemoteSession(socket)
    for node, by, away, end in (
        ("far", "tunnel", Health.DOWN, signal.SIGKILL),
        ("far", "tunnel", Health.DOWN, signal.SIGINT),
        ("near", "drain", Health.DRAINING, signal.SIGTERM),
        ("near", "drain", Health.DRAINING, signal.SIGHUP),
        ("near", "server", None, signal.SIGKILL),
    ):
        await wait_health(session, node, Health.HEALTHY)
        commands = ("--stop-command", f"echo stop >> {marks}", "--start-command", f"echo start >> {marks}")
        options = ("--by", by, "--on", node, *(commands if by == "server" else ()))
        async with gpumesh.started(*LONG, *options) as bench:
            if away is not None:
                await wait_health(session, node, away)
            else:
                async with asyncio.timeout(30):
                    while not marks.exists():
                        await asyncio.sleep(0.01)
            bench.send_signal(end)
            await bench.wait()
        await wait_health(session, node, Health.HEALTHY)
    async with asyncio.timeout(10):
        while marks.read_text() != "stop\nstart\n":
            await asyncio.sleep(0.01)
    # A person's drain is nobody's hold: it outlives the command.
    await gpumesh("drain", "near")
    await wait_health(session, "near", Health.DRAINING)
    await gpumesh("resume", "near")
    await gpumesh("down")


async def test_the_outage_is_in_table_report_and_json(mixed: SimulatedMesh) -> None:
    gpumesh = mixed.gpumesh
    await gpumesh("up", "-d")
    ended = await gpumesh("bench", "run", "--scenario", "failover", "-n", "40", "--tokens", "20", "--out", "f")
    lines = ended.out.splitlines()
    (notice,) = [line for line in lines if line.startswith("far, tunnel cut: noticed after ")]
    assert "unknown" not in notice
    (back,) = [line for line in lines if line.startswith("put back: healthy after ")]
    assert "unknown" not in back
    shown = (await gpumesh("bench", "show", "f", "--json")).json()["failover"]
    assert (shown["node"], shown["by"], shown["failed"], shown["cut"]) == ("far", "tunnel", 0, 0)
    assert shown["noticed_ms"] > 0
    if shown["continued"]:
        assert (shown["tokens_repeated"], shown["tokens_lost"], shown["counted_by"]) == (0, 0, "text")
    assert "What the outage did" in (gpumesh.home / "f" / "report.html").read_text()
    refused = await gpumesh("bench", "run", "--scenario", "failover", "--by", "server", code=2)
    assert "--by server needs --stop-command and --start-command" in refused.err
    refused = await gpumesh("bench", "run", "--by", "drain", code=2)
    assert "--by and --on are for --scenario failover" in refused.err
    await gpumesh("down")
