"""Nodes that are taken out of service for a while: what the mesh then does, on simulated hosts with real SSH."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.errors import ExecError, GPUMeshError, TunnelDown, UsageError
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.outages.out_of_service import take_out_of_service
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import Health, NodeState, TunnelPhase
from gpumesh.topology import Topology
from tests.cli.meshes import isolated_command, quick_host, simulated_mesh

DRAIN, TUNNEL = Outage(OutageKind.DRAIN), Outage(OutageKind.TUNNEL)


@asynccontextmanager
async def running_mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh of a node over SSH, ``far``, and one without, ``near``; both are up."""
    with isolated_command(tmp_path) as gpumesh:
        async with (
            simulated_mesh(gpumesh, quick_host("far"), quick_host("near", ssh=False)),
            asyncio.timeout(50),
            Mesh(config.load(gpumesh.config)) as mesh,
        ):
            await wait_health(mesh, "far", Health.HEALTHY)
            await wait_health(mesh, "near", Health.HEALTHY)
            yield mesh


def name_localhost(topology: Topology, name: str) -> Topology:
    """The topology in which the server of this node is reached by another name, so that the node is opened anew."""
    nodes = []
    for node in topology.nodes:
        targets = tuple(replace(target, host="localhost") for target in node.backend.targets)
        nodes.append(replace(node, backend=replace(node.backend, targets=targets)) if node.name == name else node)
    return replace(topology, nodes=tuple(nodes))


async def wait_health(mesh: Mesh, name: str, health: Health) -> NodeState:
    async for _ in mesh.watch_changes():
        node = mesh.snapshot().node(name)
        if node.health is health:
            return node
    raise AssertionError("the mesh has ended")


async def test_outages_of_a_node_and_their_ends(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        # A person's drain and two that are held do not end each other.
        async with take_out_of_service(mesh, "near", DRAIN):
            async with take_out_of_service(mesh, "near", DRAIN):
                assert mesh.snapshot().node("near").health is Health.DRAINING
            assert mesh.snapshot().node("near").health is Health.DRAINING
            mesh.drain("near")
        assert mesh.snapshot().node("near").health is Health.DRAINING
        mesh.resume("near")
        assert mesh.snapshot().node("near").health is Health.HEALTHY
        async with take_out_of_service(mesh, "near", DRAIN):
            mesh.resume("near")  # the person's word is the last
            assert mesh.snapshot().node("near").health is Health.HEALTHY

        # A node that a reload reaches in another way is still held, and is put back.
        async with take_out_of_service(mesh, "near", DRAIN):
            mesh.apply(name_localhost(mesh.topology, "near"), limit_s=1.0)
            await wait_health(mesh, "near", Health.DRAINING)
        await wait_health(mesh, "near", Health.HEALTHY)

        # A tunnel stays closed although its host is there, and opens at once when it is released.
        async with take_out_of_service(mesh, "far", TUNNEL):
            node = await wait_health(mesh, "far", Health.DOWN)
            assert (node.tunnel.state, node.tunnel.retry_in_s) == (TunnelPhase.BACKOFF, None)
            assert "ended unexpectedly" in (node.reason or "")
            with pytest.raises(TunnelDown):
                async with take_out_of_service(mesh, "far", TUNNEL):
                    pass
            assert mesh.snapshot().node("far").tunnel.state is TunnelPhase.BACKOFF
        node = await wait_health(mesh, "far", Health.HEALTHY)
        assert node.tunnel.reconnects == 1
        with pytest.raises(UsageError, match="no tunnel that could be closed"):
            async with take_out_of_service(mesh, "near", TUNNEL):
                pass

        # A server is stopped and started by commands; both are tried in any case.
        marks = tmp_path / "marks"
        outage = Outage(OutageKind.SERVER, f"echo stop >> {marks}", f"echo start >> {marks}")
        async with take_out_of_service(mesh, "near", outage):
            assert marks.read_text() == "stop\n"
        assert marks.read_text() == "stop\nstart\n"
        failing = Outage(OutageKind.SERVER, "echo cannot >&2; exit 3", f"echo start >> {marks}")
        with pytest.raises(ExecError, match="exit status 3 on near: cannot"):
            async with take_out_of_service(mesh, "near", failing):
                pass
        assert marks.read_text() == "stop\nstart\nstart\n"
        with pytest.raises(GPUMeshError, match="two commands"):
            async with take_out_of_service(mesh, "near", Outage(OutageKind.SERVER, "true")):
                pass
