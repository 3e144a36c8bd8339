"""Nodes that turn out to be one machine are balanced as one from then on, whatever it was known by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.lab import keys, profile
from gpumesh.lab.host import HostStart, SimHost
from gpumesh.lab.profile import HostProfile
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Target, Topology

MODEL = "qwen2.5:7b"
PATIENCE_S = 40.0
PLACES = 2


def quick_host(name: str) -> HostProfile:
    return profile.make_host(name, tokens_per_s=400.0, load_s=0.0, answer_tokens=(20, 20), slots=2 * PLACES)


@asynccontextmanager
async def hosts(folder: Path, *profiles: HostProfile) -> AsyncIterator[tuple[list[SimHost], SshSpec]]:
    """Simulated hosts in this process, and how to log in to them (their ports are still to be set)."""
    visitor, identity = keys.new_key(), folder / "id"
    identity.touch(mode=0o600)
    identity.write_text(visitor)
    started: list[SimHost] = []
    lines: list[str] = []
    try:
        for each in profiles:
            host_key = keys.new_key()
            host = SimHost(HostStart(each, host_key, (keys.public_key_line(visitor),)))
            started.append(await host.__aenter__())
            assert host.ssh_port is not None
            lines.append(keys.known_hosts_line(host_key, host.ssh_port))
        (folder / "known_hosts").write_text("\n".join(lines) + "\n")
        yield (
            started,
            SshSpec(keys.LOOPBACK_HOST, identity_files=(identity,), known_hosts=folder / "known_hosts", agent=False),
        )
    finally:
        for host in started:
            await host.__aexit__(None, None, None)


def ssh_node(name: str, host: SimHost, ssh: SshSpec) -> NodeSpec:
    assert host.ssh_port is not None
    targets = (Target("127.0.0.1", host.profile.backend_port),)
    return NodeSpec(name, BackendSpec(targets=targets, max_parallel=PLACES), ssh=replace(ssh, port=host.ssh_port))


async def send_request(mesh: Mesh, number: int) -> None:
    async for _ in mesh.chat(MODEL, f"prompt {number}"):
        pass


@pytest.mark.slow
async def test_two_nodes_of_one_server_share_its_slots(tmp_path: Path) -> None:
    """By the model store alone: the direct way leads to no nvidia-smi. What runs there at once is what one may run."""
    async with hosts(tmp_path, quick_host("iceland")) as ((host,), ssh):
        url = Target("127.0.0.1", host.backend_port)
        specs = (
            ssh_node("iceland", host, ssh),
            NodeSpec("local", BackendSpec(targets=(url,), max_parallel=PLACES)),
        )
        async with Mesh(Topology("home", specs)) as mesh:
            state = await mesh.wait_first_report(PATIENCE_S)
            assert [finding.code for finding in state.findings if finding.nodes] == ["same-gpu"]
            assert (state.totals.gpus, state.totals.vram_total_mib) == (1, 24564)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(send_request(mesh, number) for number in range(12)))
        assert host.counters.finished == 12
        assert host.counters.max_in_flight == PLACES


@pytest.mark.slow
async def test_two_hosts_have_slots_of_their_own(tmp_path: Path) -> None:
    async with hosts(tmp_path, quick_host("iceland"), quick_host("norway")) as (started, ssh):
        specs = tuple(ssh_node(each.profile.name, each, ssh) for each in started)
        async with Mesh(Topology("home", specs)) as mesh:
            state = await mesh.wait_first_report(PATIENCE_S)
            assert state.findings == ()
            assert state.totals.gpus == 2
            assert all(node.tunnel.host_keys for node in state.nodes)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(send_request(mesh, number) for number in range(12)))
        assert sum(each.counters.finished for each in started) == 12
        assert [each.counters.max_in_flight for each in started] == [PLACES, PLACES]
