"""The probes by themselves: a link whose tunnel is direct, a ledger, and the lab's server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest

from gpumesh.balancer.base import Demand
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.prober import (
    NO_COMMANDS_INTERVAL_S,
    NodeReports,
    Prober,
    find_gpu_pause_s,
    find_gpu_timeout_s,
)
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.probes.nvidia_smi import Answer, GpuReport
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec
from gpumesh.tunnels.base import ExecResult, ShellStream, Tunnel
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.http_clients import loopback_client
from tests.mesh.nodes.build import NodeEvents, make_node, make_scheduler, make_spec, place
from tests.probes.command_routes import ScriptedRoute, ScriptedShell
from tests.tunnels.polling import wait_until

HOST = profile.make_instant_host("one")
UP = TunnelState("direct", TunnelPhase.UP)


@dataclass
class ProberDesk:
    """A prober whose loops do not run: a test asks for each probe with ``refresh``."""

    spec: NodeSpec
    server: SimOllama
    http: httpx.AsyncClient
    events: NodeEvents = field(default_factory=NodeEvents)
    reports: int = 0

    def __post_init__(self) -> None:
        self.link = TunnelLink(self.spec)
        self.link.tunnel = DirectTunnel(self.spec, on_change=self.link.update)
        scheduler = make_scheduler()
        self.ledger = Ledger(
            scheduler.roster.add(self.spec.name),
            scheduler,
            clock=self.events.clock,
            on_slot_freed=self.events.on_slot_freed,
            on_change=self.events.changes.notify,
            on_failure=lambda _outcome, _error: None,
            on_model_loaded=lambda _model: None,
        )
        self.prober = Prober(
            self.spec,
            self.link,
            self.ledger,
            clock=self.events.clock,
            http=self.http,
            on_report=self.count_report,
        )

    def lease(self) -> Lease:
        demand = Demand(model="m")
        placement = place(self.ledger.account, demand, self.events.now)
        return self.ledger.lease(make_node(self.spec, self.events), demand, placement)

    def count_report(self) -> None:
        self.reports += 1


@asynccontextmanager
async def open_desk(**backend: Any) -> AsyncIterator[ProberDesk]:
    async with SimOllama(HOST) as server, loopback_client() as http:
        yield ProberDesk(make_spec(server.url, **backend), server, http)


async def test_nothing_is_asked_before_the_tunnel_is_up() -> None:
    async with open_desk() as desk:
        await desk.prober.refresh()
        assert desk.prober.reports == NodeReports()
        desk.link.update(UP)
        await desk.prober.refresh()
        assert desk.prober.reports.backend_is_up
        assert desk.prober.reports.target == desk.spec.backend.targets[0]
        assert "qwen2.5:7b" in (desk.prober.reports.models or ())
        assert desk.reports == 1


async def test_what_was_asked_over_a_lost_connection_is_forgotten_but_the_models() -> None:
    async with open_desk() as desk:
        desk.link.update(UP)
        await desk.prober.refresh()
        desk.prober.forget_host()
        assert desk.prober.reports.backend is None
        assert desk.prober.reports.models


async def test_one_missed_probe_of_a_busy_server_is_excused() -> None:
    async with open_desk() as desk:
        desk.link.update(UP)
        await desk.prober.refresh()
        lease = desk.lease()
        await desk.server.set_faults(Faults(status=500))
        await desk.prober.refresh()
        assert desk.prober.reports.backend_is_up
        await desk.prober.refresh()
        assert not desk.prober.reports.backend_is_up, "the second one in a row counts"
        lease.discard()


async def test_the_miss_of_an_idle_server_counts_and_moves_waiting_attempts() -> None:
    async with open_desk() as desk:
        desk.link.update(UP)
        await desk.prober.refresh()
        await desk.server.set_faults(Faults(status=500))
        await desk.prober.refresh()
        assert not desk.prober.reports.backend_is_up
        lease = desk.lease()
        lease.can_move = lambda: True
        await desk.prober.refresh()
        assert lease.aborted


async def test_a_server_that_came_back_has_a_closed_breaker() -> None:
    async with open_desk() as desk:
        desk.link.update(UP)
        await desk.server.set_faults(Faults(status=500))
        await desk.prober.refresh()
        for _ in range(3):
            desk.ledger.breaker = desk.ledger.breaker.record_failure(desk.events.now)
        await desk.server.set_faults(Faults())
        await desk.prober.refresh()
        assert desk.ledger.breaker.allows(desk.events.now)


async def test_a_model_that_answered_counts_as_loaded() -> None:
    async with open_desk() as desk:
        before = desk.prober.reports
        desk.prober.note_loaded("new:latest")
        assert "new:latest" in desk.prober.reports.loaded
        same = desk.prober.reports
        desk.prober.note_loaded("new:latest")
        assert desk.prober.reports is same is not before


async def test_a_missing_secret_ends_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUMESH_TEST_KEY", raising=False)
    async with open_desk(api_key_env="GPUMESH_TEST_KEY") as desk:
        desk.link.update(UP)
        await desk.prober.refresh()
        assert desk.prober.first_round_done
        assert desk.prober.reports.missing_secret is not None
        assert desk.prober.reports.backend is None


async def test_a_secret_that_appears_later_ends_the_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUMESH_TEST_KEY", raising=False)
    async with open_desk(api_key_env="GPUMESH_TEST_KEY") as desk:
        desk.link.update(UP)
        await desk.prober.refresh()
        monkeypatch.setenv("GPUMESH_TEST_KEY", "secret")
        await desk.prober.refresh()
        assert desk.prober.reports.missing_secret is None
        assert desk.prober.reports.backend_is_up


async def test_both_loops_run_and_end_the_first_round() -> None:
    async with open_desk() as desk:
        loops = [desk.prober.keep_probing_backend(), desk.prober.keep_probing_gpus()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        desk.link.update(UP)
        await desk.prober.wait_first_round()
        assert desk.prober.reports.gpus is not None
        assert "first round done True" in repr(desk.prober)
        seen = desk.reports
        desk.prober.request_probe()
        await wait_until(lambda: desk.reports > seen, "it is probed at once")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- how often the GPUs are asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(("took_s", "timeout_s"), [(None, 5.0), (0.1, 5.0), (8.0, 24.0), (40.0, 30.0)])
def test_a_host_that_is_always_slow_gets_more_time(took_s: float | None, timeout_s: float) -> None:
    assert find_gpu_timeout_s(GpuReport(took_s=took_s)) == timeout_s
    assert find_gpu_timeout_s(None) == 5.0


def test_a_host_that_does_not_answer_is_asked_less_often() -> None:
    refused = GpuReport(answer=Answer.NO_SESSION)
    pauses = [find_gpu_pause_s(refused, 2.0, failures) for failures in range(1, 8)]
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert find_gpu_pause_s(refused, 2.0, 10**9) == 60.0
    assert find_gpu_pause_s(GpuReport(), 2.0, 0) == 2.0
    assert find_gpu_pause_s(GpuReport(answer=Answer.UNFINISHED), 2.0, 0) == 2.0, "it waits, and starts nothing new"
    assert find_gpu_pause_s(GpuReport(answer=Answer.NO_COMMANDS), 2.0, 0) == NO_COMMANDS_INTERVAL_S


async def test_a_host_that_runs_no_commands_is_asked_once_for_each_connection_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpumesh.mesh.nodes.prober")

    async def refuse(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        del argv, timeout_s
        return ExecResult(1, b"", b"")

    shells: list[ShellStream | None] = []
    for _ in range(2):
        shell = ScriptedShell()
        shell.say(b"forwarding only\n")
        shell.end(1)
        shells.append(shell)
    route = ScriptedRoute(refuse, shells)
    async with open_desk() as desk:
        desk.link.tunnel = cast("Tunnel", route)
        task = asyncio.create_task(desk.prober.keep_probing_gpus())
        for connection in (1, 2):
            desk.link.update(UP)
            await wait_until(lambda: desk.reports == connection, f"report {connection}")  # noqa: B023
            report = desk.prober.reports.gpus
            assert report is not None
            assert report.answer is Answer.NO_COMMANDS
            assert "'forwarding only'" in (report.error or "")
            desk.link.update(TunnelState("sshtunnel", TunnelPhase.BACKOFF))
            desk.prober.forget_host()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(route.calls) == 2 * 4, "each connection: three commands and the proof"
    assert caplog.text.count("runs no commands") == 1
