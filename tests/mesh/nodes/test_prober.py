"""The probes by themselves: a link whose tunnel is direct, a ledger, and the lab's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from gpumesh.balancer.base import Demand
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.prober import NodeReports, Prober
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.topology import NodeSpec
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.mesh.nodes.build import NodeEvents, make_node, make_spec
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
        self.ledger = Ledger(
            self.spec.backend,
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

    def count_report(self) -> None:
        self.reports += 1


@asynccontextmanager
async def desk(**backend: Any) -> AsyncIterator[ProberDesk]:
    async with SimOllama(HOST) as server, httpx.AsyncClient(trust_env=False) as http:
        yield ProberDesk(make_spec(server.url, **backend), server, http)


async def test_nothing_is_asked_before_the_tunnel_is_up() -> None:
    async with desk() as made:
        await made.prober.refresh()
        assert made.prober.reports == NodeReports()
        made.link.update(UP)
        await made.prober.refresh()
        assert made.prober.reports.backend_is_up
        assert made.prober.reports.target == made.spec.backend.targets[0]
        assert "qwen2.5:7b" in (made.prober.reports.models or ())
        assert made.reports == 1


async def test_what_was_asked_over_a_lost_connection_is_forgotten_but_the_models() -> None:
    async with desk() as made:
        made.link.update(UP)
        await made.prober.refresh()
        made.prober.forget_host()
        assert made.prober.reports.backend is None
        assert made.prober.reports.models


async def test_one_missed_probe_of_a_busy_server_is_excused() -> None:
    async with desk() as made:
        made.link.update(UP)
        await made.prober.refresh()
        lease = made.ledger.lease(make_node(made.spec, made.events), Demand(model="m"))
        await made.server.set_faults(Faults(status=500))
        await made.prober.refresh()
        assert made.prober.reports.backend_is_up
        await made.prober.refresh()
        assert not made.prober.reports.backend_is_up, "the second one in a row counts"
        lease.discard()


async def test_the_miss_of_an_idle_server_counts_and_moves_waiting_attempts() -> None:
    async with desk() as made:
        made.link.update(UP)
        await made.prober.refresh()
        await made.server.set_faults(Faults(status=500))
        await made.prober.refresh()
        assert not made.prober.reports.backend_is_up
        lease = made.ledger.lease(make_node(made.spec, made.events), Demand(model="m"))
        lease.can_move = lambda: True
        await made.prober.refresh()
        assert lease.aborted


async def test_a_server_that_came_back_has_a_closed_breaker() -> None:
    async with desk() as made:
        made.link.update(UP)
        await made.server.set_faults(Faults(status=500))
        await made.prober.refresh()
        for _ in range(3):
            made.ledger.breaker = made.ledger.breaker.record_failure(made.events.now)
        await made.server.set_faults(Faults())
        await made.prober.refresh()
        assert made.ledger.breaker.allows(made.events.now)


async def test_a_model_that_answered_counts_as_loaded() -> None:
    async with desk() as made:
        before = made.prober.reports
        made.prober.note_loaded("new:latest")
        assert "new:latest" in made.prober.reports.loaded
        same = made.prober.reports
        made.prober.note_loaded("new:latest")
        assert made.prober.reports is same is not before


async def test_a_missing_secret_ends_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUMESH_TEST_KEY", raising=False)
    async with desk(api_key_env="GPUMESH_TEST_KEY") as made:
        made.link.update(UP)
        await made.prober.refresh()
        assert made.prober.first_round_done
        assert made.prober.reports.missing_secret is not None
        assert made.prober.reports.backend is None


async def test_both_loops_run_and_end_the_first_round() -> None:
    async with desk() as made:
        loops = [made.prober.keep_probing_backend(), made.prober.keep_probing_gpus()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        made.link.update(UP)
        await made.prober.wait_first_round()
        assert made.prober.reports.gpus is not None
        assert "first round done True" in repr(made.prober)
        seen = made.reports
        made.prober.request_probe()
        await wait_until(lambda: made.reports > seen, "it is probed at once")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
