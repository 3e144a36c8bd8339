"""What a mesh says of accounts that run no commands, or not yet: their servers work, so they are healthy."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gpumesh.lab.ollama import SimOllama
from gpumesh.state import Health, NodeState
from gpumesh.topology import BackendKind, BackendSpec, ExpectSpec, NodeSpec, Target, TransportKind
from tests.mesh.meshes import host, mesh_of_nodes
from tests.prerequisites import needs
from tests.tunnels.hosts.account import USER
from tests.tunnels.hosts.visit import Host, running
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, needs("sshd", "ssh", "nss-wrapper")]

FORWARD_ONLY = Host("forward-only", shell="false")
SLOW = Host("slow", files={".bashrc": "echo start >>~/shells; sleep 10\n"})


def codes(node: NodeState) -> list[str]:
    return [finding.code for finding in node.noticed]


async def test_forward_only_and_slow_accounts_are_healthy(
    tmp_path: Path, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpumesh")
    async with (
        SimOllama(host("server")) as server,
        running(FORWARD_ONLY, tmp_path / "forward") as (_, forward_sshd),
        running(SLOW, tmp_path / "slow") as (slow_account, slow_sshd),
    ):
        backend = BackendSpec(BackendKind.OLLAMA, (Target("127.0.0.1", server.port),))
        nodes = [
            NodeSpec(
                f"{name}-{transport.value}",
                backend,
                sshd.spec(user=USER, transport=transport),
                expect=ExpectSpec(gpus=1) if name == "forward" else ExpectSpec(),
            )
            for name, sshd in (("forward", forward_sshd), ("slow", slow_sshd))
            for transport in TransportKind
        ]
        async with mesh_of_nodes(*nodes) as running_mesh:
            mesh = running_mesh.mesh

            def slow_logins_noticed() -> bool:
                slow_nodes = [node for node in mesh.snapshot().nodes if node.name.startswith("slow")]
                return all(codes(node) == ["login-shell-slow"] for node in slow_nodes)

            await wait_until(slow_logins_noticed, "the slow logins")
            states = {node.name: node for node in mesh.snapshot().nodes}
            for transport in TransportKind:
                forward = states[f"forward-{transport.value}"]
                assert (forward.health, forward.reason, forward.gpus) == (Health.HEALTHY, None, None)
                assert codes(forward) == ["gpu-unknown"]
                slow = states[f"slow-{transport.value}"]
                assert (slow.health, slow.gpus) == (Health.HEALTHY, None)
                assert codes(slow) == ["login-shell-slow"]

            def slow_gpus_known() -> bool:
                slow_nodes = [node for node in mesh.snapshot().nodes if node.name.startswith("slow")]
                return all(node.gpus for node in slow_nodes)

            await wait_until(slow_gpus_known, "the GPUs of the slow accounts")
            assert all(node.health is Health.HEALTHY for node in mesh.snapshot().nodes)
            assert all(node.tunnel.reconnects == 0 for node in mesh.snapshot().nodes)
            # For each node one shell of its transport, and one for all probes.
            assert slow_account.lines("shells") == 4
    said = [record for record in caplog.records if "runs no commands" in record.getMessage()]
    assert len(said) == 2, "once for each node"
