"""When a running mesh inspects its nodes, by a clock that the test moves; and that its findings reach the status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from gpumesh.errors import ExecError, SecretMissing
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.inspection import regular_inspection
from gpumesh.mesh.inspection.regular_inspection import (
    CHECK_INTERVAL_S,
    INTERVAL_S,
    MAX_CONCURRENT,
    SETTLE_S,
    RegularInspection,
)
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.nodes.snapshot import NodeRole
from gpumesh.probes.commands.combined_commands import OUTPUT_MARKER
from gpumesh.probes.commands.host_commands import HostCommands
from gpumesh.probes.disk_space import FREE_SPACE_COMMAND
from gpumesh.state import BackendPhase, BackendState, Health, NodeState, TunnelPhase, TunnelState
from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Target, Topology
from gpumesh.tunnels.base import ExecResult, Tunnel
from tests.http_clients import loopback_client
from tests.mesh.meshes import host
from tests.tunnels.polling import wait_until

DF = b"Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 1000000 900000 %d 90%% /\n"


class ManualTime:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self.now + seconds, event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        """In steps, as the loop checks; after each step all tasks have run as far as they can."""
        ends = self.now + seconds
        while self.now < ends:
            self.now = min(self.now + CHECK_INTERVAL_S, ends)
            due = [entry for entry in self._sleepers if entry[0] <= self.now]
            self._sleepers = [entry for entry in self._sleepers if entry[0] > self.now]
            for _, event in due:
                event.set()
            for _ in range(30):
                await asyncio.sleep(0)


@dataclass
class InspectedTunnel:
    """Answers `df`, as the tunnel to this machine would. ``gate`` holds the answers back while it is cleared."""

    free_kib: int = 4 << 20
    fails: bool = False
    runs: int = 0
    running: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        limit_bytes: int = 1 << 20,
        shareable: bool = False,
    ) -> ExecResult:
        self.runs += 1
        self.running += 1
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        if self.fails:
            raise ExecError("no session")
        script = argv[2]  # runs `df`, and prints the marker after its output
        assert "df -Pk" in script
        return ExecResult(0, DF % self.free_kib + f"{OUTPUT_MARKER} 0\n".encode(), b"")

    async def open_shell(self) -> None:
        return None


class InspectedHost:
    """What an inspection needs of a node, as the test sets it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec = NodeSpec(name, BackendSpec(), ssh=SshSpec("", 22))
        self.commands = InspectedTunnel()
        self.commands.gate.set()
        self.tunnel: Tunnel | None = cast("Tunnel", self.commands)
        self.role = NodeRole()
        self.reachable = True
        self.connection_count = 1
        self.host_commands = HostCommands(self.commands, clock=time.monotonic)
        self.base_url = "http://127.0.0.1:1"
        self.key_error: Exception | None = None

    def api_key(self) -> str | None:
        if self.key_error is not None:
            raise self.key_error
        return None

    def state(self, queued: int = 0) -> NodeState:
        backend = BackendState("ollama", BackendPhase.UP, url=self.base_url)
        return NodeState(self.name, Health.HEALTHY, None, TunnelState("sshtunnel", TunnelPhase.UP), backend)


@asynccontextmanager
async def inspecting(*nodes: InspectedHost) -> AsyncIterator[tuple[RegularInspection, ManualTime, list[None]]]:
    """The inspection as it runs, its time, and a list that grows with each report."""
    time, reports = ManualTime(), list[None]()
    async with loopback_client() as client:
        inspection = RegularInspection(
            nodes, client, clock=time.clock, on_report=lambda: reports.append(None), sleep=time.sleep
        )
        task = asyncio.create_task(inspection.run())
        await asyncio.sleep(0)
        try:
            yield inspection, time, reports
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_once_after_the_node_came_up_and_then_at_long_intervals() -> None:
    node = InspectedHost("alpha")
    async with inspecting(node) as (inspection, time, reports):
        assert repr(inspection) == "<RegularInspection 1 nodes, 0 reports, 0 running>"
        await time.advance(SETTLE_S * 0.5 - CHECK_INTERVAL_S)
        assert node.commands.runs == 0, "it settles first"
        await time.advance(SETTLE_S + 2 * CHECK_INTERVAL_S)
        assert (node.commands.runs, len(reports)) == (1, 1)
        assert inspection.merge(node.state()).host.store_free_mib == 4096
        await time.advance(INTERVAL_S - 2 * SETTLE_S)
        assert node.commands.runs == 1
        await time.advance(2 * SETTLE_S)
        assert node.commands.runs == 2
        assert repr(inspection) == "<RegularInspection 1 nodes, 1 reports, 0 running>"


async def test_not_while_the_node_is_down_or_draining() -> None:
    down, draining = InspectedHost("down"), InspectedHost("draining")
    down.reachable, draining.role.drained = False, True
    async with inspecting(down, draining) as (_, time, _reports):
        await time.advance(3 * INTERVAL_S)
        assert (down.commands.runs, draining.commands.runs) == (0, 0)
        down.reachable, draining.role.drained = True, False
        await time.advance(2 * SETTLE_S)
        assert (down.commands.runs, draining.commands.runs) == (1, 1)


async def test_a_node_that_is_drained_for_a_while_keeps_its_report_and_its_turn() -> None:
    node = InspectedHost("alpha")
    async with inspecting(node) as (inspection, time, _):
        await time.advance(2 * SETTLE_S)
        node.role.drained = True
        await time.advance(2 * SETTLE_S)
        assert inspection.merge(node.state()).host.store_free_mib == 4096
        node.role.drained = False
        await time.advance(2 * SETTLE_S)
        assert node.commands.runs == 1


@pytest.mark.parametrize("change", ["connection", "url"])
async def test_a_report_is_of_no_use_when_the_node_is_reached_otherwise(change: str) -> None:
    """Behind a new connection, or another route, there may be another host."""
    node = InspectedHost("alpha")
    async with inspecting(node) as (inspection, time, _):
        await time.advance(2 * SETTLE_S)
        if change == "connection":
            node.connection_count += 1
        else:
            node.base_url = "http://127.0.0.1:2"
        node.commands.free_kib = 1 << 20
        assert inspection.merge(node.state()).host.store_free_mib is None
        await time.advance(2 * SETTLE_S)
        assert node.commands.runs == 2, "it is inspected anew, soon"
        assert inspection.merge(node.state()).host.store_free_mib == 1024


async def test_a_report_about_a_connection_that_was_lost_meanwhile_is_dropped() -> None:
    node = InspectedHost("alpha")
    node.commands.gate.clear()
    async with inspecting(node) as (inspection, time, reports):
        await time.advance(2 * SETTLE_S)
        assert node.commands.running == 1
        node.connection_count += 1
        node.commands.gate.set()
        await time.advance(CHECK_INTERVAL_S)
        assert reports == []
        assert inspection.merge(node.state()).host.store_free_mib is None
        await time.advance(2 * SETTLE_S)
        assert (node.commands.runs, len(reports)) == (2, 1)


async def test_only_a_few_nodes_at_a_time_and_each_node_once() -> None:
    nodes = [InspectedHost(f"node-{number}") for number in range(3 * MAX_CONCURRENT)]
    for node in nodes:
        node.commands.gate.clear()
    async with inspecting(*nodes) as (_, time, reports):
        await time.advance(2 * SETTLE_S)
        assert sum(node.commands.running for node in nodes) == MAX_CONCURRENT
        assert max(node.commands.running for node in nodes) == 1
        for node in nodes:
            node.commands.gate.set()
        await time.advance(4 * CHECK_INTERVAL_S)
        assert len(reports) == len(nodes)


async def test_no_command_while_another_one_runs_on_the_host() -> None:
    node = InspectedHost("alpha")
    async with inspecting(node) as (_, time, _reports):
        node.commands.gate.clear()
        probe = asyncio.create_task(node.host_commands.run((FREE_SPACE_COMMAND,), timeout_s=20.0))
        await time.advance(2 * SETTLE_S)
        assert node.commands.runs == 1, "the probe's"
        node.commands.gate.set()
        await probe
        await time.advance(CHECK_INTERVAL_S)
        assert node.commands.runs == 2


async def test_a_host_that_runs_no_commands_is_not_known_to_have_space() -> None:
    node = InspectedHost("alpha")
    node.commands.fails = True
    async with inspecting(node) as (inspection, time, reports):
        await time.advance(2 * SETTLE_S)
        assert len(reports) == 1
        assert inspection.merge(node.state()).host.store_free_mib is None


@pytest.mark.parametrize("error", [SecretMissing("no such variable"), TypeError("a bug")])
async def test_what_goes_wrong_costs_one_inspection(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    ill, well = InspectedHost("ill"), InspectedHost("well")
    ill.key_error = error
    async with inspecting(ill, well) as (_, time, reports):
        await time.advance(2 * SETTLE_S)
        assert len(reports) == 1
        assert [record.message for record in caplog.records] == (
            ["a node could not be inspected"] if isinstance(error, TypeError) else []
        )
        ill.key_error = None
        await time.advance(INTERVAL_S + 2 * CHECK_INTERVAL_S)
        assert ill.commands.runs == 1


async def test_the_findings_reach_the_status_of_a_running_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_inspection, "SETTLE_S", 0.2)
    monkeypatch.setattr(regular_inspection, "CHECK_INTERVAL_S", 0.05)
    async with SimOllama(host("a")) as first, SimOllama(host("b")) as second:
        targets = tuple(Target("127.0.0.1", port) for port in (first.port, second.port, 1))
        node = NodeSpec("both", BackendSpec(targets=targets))
        async with Mesh(Topology("test", (node, replace(node, name="off", enabled=False)))) as mesh:
            await mesh.wait_first_report(10.0)
            await wait_until(
                lambda: {"routes-differ", "route-dead"} <= {finding.code for finding in mesh.snapshot().findings},
                "both findings",
            )
            states = [route.state for route in mesh.snapshot().node("both").routes]
    assert states == [BackendPhase.UP, BackendPhase.UP, BackendPhase.DOWN]
