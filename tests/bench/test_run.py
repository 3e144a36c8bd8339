"""Whole benchmarks on a real mesh over stand-ins in this process: what is sent where, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from gpumesh.backends.base import ChatRequest
from gpumesh.bench import run as bench
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.load.route_arms import RouteAccess
from gpumesh.bench.load.routes import ApiKeys
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.load.send_prompt import AnswerStream, SendPrompt
from gpumesh.bench.measured_nodes import has_model, usable_nodes
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.run import BenchOutput
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import Stage, StageKind
from gpumesh.bench.workload.traces import TracedRequest
from gpumesh.errors import MeshNotRunning, NoNodeError, UsageError
from gpumesh.gateway.app import Gateway
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.outages.out_of_service import take_out_of_service
from gpumesh.mesh.outages.outage import Outage
from gpumesh.state import (
    BackendPhase,
    BackendState,
    GatewayState,
    Health,
    MeshState,
    NodeState,
    TunnelState,
    compute_totals,
)
from tests.mesh.meshes import MODEL, RunningMesh, host, mesh_of_hosts, mesh_of_nodes, node

SOON = BenchSettings(MODEL, requests=3, tokens=4)


@dataclass
class Target:
    """The mesh itself. ``held`` and ``released`` are the nodes that were taken out of service and put back."""

    mesh: Mesh
    embedded: bool = True
    held: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    def send(self) -> SendPrompt:
        def send(request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]:
            return self.mesh.chat(request, node=node)

        return send

    async def status(self) -> MeshState:
        return self.mesh.snapshot()

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        async for _ in self.mesh.watch_changes():
            yield self.mesh.snapshot()
            await asyncio.sleep(interval_s)

    @asynccontextmanager
    async def hold(self, node: str, outage: Outage) -> AsyncIterator[None]:
        async with take_out_of_service(self.mesh, node, outage):
            self.held.append(node)
            try:
                yield
            finally:
                self.released.append(node)


@dataclass
class Heard:
    """What a person who waits is told."""

    stages: list[str] = field(default_factory=list)
    records: list[LoadSample] = field(default_factory=list)

    def start_stage(self, stage: Stage) -> None:
        self.stages.append(stage.name)

    def add_record(self, record: LoadSample) -> None:
        self.records.append(record)


@asynccontextmanager
async def two(**gateway: Any) -> AsyncIterator[RunningMesh]:
    async with mesh_of_hosts(host("alpha"), host("beta", tokens_per_s=500.0), port=0, **gateway) as made:
        yield made


async def ran(
    made: RunningMesh, scenario: Scenario, settings: BenchSettings = SOON, *, heard: Heard | None = None, **options: Any
) -> BenchOutput:
    target = options.pop("target", None) or Target(made.mesh)
    async with asyncio.timeout(50):
        return await bench.run_benchmark(
            target, scenario, settings, progress=heard or Heard(), rng=Random(1), **options
        )


def named(done: BenchOutput, name: str) -> StageResult:
    (found,) = [stage for stage in done.result.stages if stage.name == name]
    return found


async def test_quick_measures_each_node_and_all() -> None:
    heard = Heard()
    async with two() as made:
        done = await ran(made, Scenario.QUICK, heard=heard)
        assert made.wait_settled()
        counted = {name: host.counters.finished for name, host in made.hosts.items()}
    assert heard.stages == ["warm-up", "alpha", "beta", "mesh"]
    assert len(heard.records) == len(done.records) == 2 + 3 + 3 + 6
    result = done.result
    assert [stage.name for stage in result.stages] == ["alpha", "beta", "mesh"], "what warms up is no figure"
    assert [stage.served for stage in result.stages] == [3, 3, 6]
    assert {record.node for record in done.records if record.stage == "beta"} == {"beta"}
    shares = {share.node: share.served for share in named(done, "mesh").nodes}
    assert sum(shares.values()) == 6
    assert counted == {name: 1 + 3 + shares.get(name, 0) for name in ("alpha", "beta")}
    assert all(stage.output_tokens == 4 * stage.served for stage in result.stages)
    assert result.scaling is not None
    assert [name for name, _ in result.scaling.nodes] == ["alpha", "beta"]
    assert (result.environment.mesh, result.environment.embedded) == ("test", True)
    assert [one.name for one in result.environment.nodes] == ["alpha", "beta"]
    assert "simulated hosts: the figures are the stand-in's, not a GPU's" in result.notes
    assert result.routes == ()


@pytest.mark.slow
async def test_rates_are_those_that_were_set() -> None:
    async with two() as made:
        done = await ran(made, Scenario.QUICK, BenchSettings(MODEL, requests=3, tokens=100))
    assert named(done, "alpha").rates.server.p50 == pytest.approx(1000.0, rel=0.03)
    assert named(done, "beta").rates.server.p50 == pytest.approx(500.0, rel=0.03)


async def test_sweep_and_scale() -> None:
    async with two() as made:
        swept = await ran(made, Scenario.SWEEP, BenchSettings(MODEL, requests=2, tokens=2, concurrency=(1, 3)))
        assert [(stage.name, stage.concurrency, stage.served) for stage in swept.result.stages] == [
            ("c=1", 1, 10),
            ("c=3", 3, 12),
        ]
        assert swept.result.scaling is None
        scaled = await ran(made, Scenario.SCALE, BenchSettings(MODEL, requests=4, tokens=2, concurrency=(2,)))
    assert [(stage.name, stage.concurrency) for stage in scaled.result.stages] == [
        ("alpha", 2),
        ("beta", 2),
        ("mesh", 4),
    ]
    assert scaled.result.scaling is not None
    assert scaled.result.capacity == ()


async def test_the_capacity_is_found_where_nothing_is_known() -> None:
    """The mesh has learned nothing yet. How many slots are found depends on the machine's other load (the benchmark
    bench_scale_check.py checks it), and what is made of the number does not."""
    async with mesh_of_hosts(host("alpha", slots=3), host("beta", slots=1), max_parallel=None) as made:
        done = await ran(made, Scenario.SCALE, BenchSettings(MODEL, tokens=8, requests=1))
        reached = [made.hosts[name].counters.max_in_flight for name in ("alpha", "beta")]
    found = {one.node: one.parallel for one in done.result.capacity}
    assert list(found) == ["alpha", "beta"]
    assert min(reached) > 1, "the ramps reached the servers, and did not wait in our queue"
    levels = {stage.name: stage.concurrency for stage in done.result.stages}
    assert levels == {**found, "mesh": sum(found.values())}, "the ramp is no figure"
    assert any(record.stage.startswith("capacity of alpha") for record in done.records), "but nothing of it is lost"


async def test_overhead_goes_every_way_in_turn() -> None:
    async with two() as made:
        done = await ran(made, Scenario.OVERHEAD)
        assert {(stage.name, stage.route): stage.served for stage in done.result.stages} == {
            (name, route): 3 for name in ("alpha", "beta") for route in ("direct", "direct again", "mesh")
        }
        async with Gateway(made.mesh):
            served = await ran(made, Scenario.OVERHEAD, replace(SOON, requests=8))
    assert {stage.failed for stage in served.result.stages} == {0}
    assert [stage.route for stage in served.result.stages] == ["direct", "direct again", "mesh", "gateway"] * 2
    assert served.result.routes[0].added_p50_ms == 0.0
    compared = [(one.node, one.route, one.base, one.rounds) for one in served.result.route_differences]
    assert compared == [
        (name, route, "direct", 8) for name in ("alpha", "beta") for route in ("direct again", "mesh", "gateway")
    ]
    gateway = served.result.route_differences[2]
    assert gateway.low_ms is not None
    assert gateway.high_ms is not None
    assert gateway.low_ms <= gateway.added_ms <= gateway.high_ms


async def test_a_gateway_that_wants_a_key_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_KEY", "open sesame")
    async with two(api_key_env="MESH_KEY") as made, Gateway(made.mesh):
        refused = await ran(made, Scenario.OVERHEAD)
        assert [stage.failed for stage in refused.result.stages] == [0, 0, 0, 3] * 2
        opened = await ran(made, Scenario.OVERHEAD, access=RouteAccess(ApiKeys(gateway="open sesame")))
    assert opened.result.failed == 0


async def test_a_run_that_is_cancelled_gives_the_node_back_and_ends_its_requests() -> None:
    async with two() as made:
        target = Target(made.mesh)
        slow = BenchSettings(MODEL, requests=200, tokens=20)
        running = asyncio.create_task(ran(made, Scenario.FAILOVER, slow, target=target))
        while not target.held:
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert target.released == target.held
        async with asyncio.timeout(20):
            while not made.wait_settled():
                await asyncio.sleep(0.005)


@dataclass
class Kept:
    """The results and the number of records that a run gave away while it went on."""

    results: list[BenchResult] = field(default_factory=list)
    records: list[LoadSample] = field(default_factory=list)

    def keep(self, result: BenchResult, records: Sequence[LoadSample]) -> None:
        self.results.append(result)
        self.records = list(records)

    def stages(self) -> list[tuple[str, bool]]:
        return [(stage.name, stage.partial) for stage in self.results[-1].stages]


async def test_what_is_measured_is_kept_after_each_stage() -> None:
    kept = Kept()
    async with two() as made:
        done = await ran(made, Scenario.QUICK, keep=kept.keep)
    assert [len(result.stages) for result in kept.results] == [0, 0, 1, 2, 3, 3]
    assert [result.partial for result in kept.results] == [True] * 5 + [False]
    assert kept.results[0].settings == SOON
    assert kept.results[-1] == done.result
    assert kept.records == list(done.records)


async def test_a_run_that_is_cancelled_keeps_what_it_has_measured() -> None:
    kept, heard = Kept(), Heard()
    settings = BenchSettings(MODEL, requests=40, tokens=100, concurrency=(2,))
    async with two() as made:
        running = asyncio.create_task(ran(made, Scenario.SWEEP, settings, heard=heard, keep=kept.keep))

        def tokens_in_flight() -> int:
            return sum(host.counters.tokens for host in made.hosts.values()) - sum(r.tokens or 0 for r in heard.records)

        while len(heard.records) < 2 + 6 or tokens_in_flight() < 60:  # two of the warm-up
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert kept.stages() == [("c=2", True)]
    (stage,) = kept.results[-1].stages
    assert (kept.results[-1].partial, kept.results[-1].partial_reason) == (True, None), "the caller knows the reason"
    assert (stage.served >= 6, stage.failed, stage.cut, stage.planned) == (True, 0, 0, 40)
    assert 1 <= stage.unfinished <= 2
    assert stage.requests == stage.served + stage.unfinished == len(kept.records) - 2
    assert stage.rates.output_tokens_per_s


@dataclass
class MortalTarget(Target):
    """A mesh that ends after ``answers`` more prompts: then it takes no prompt and tells no state."""

    answers: int = 0

    def send(self) -> SendPrompt:
        inner = super().send()

        @asynccontextmanager
        async def send(request: ChatRequest, node: str | None) -> AsyncIterator[AnswerStream]:
            if self.answers <= 0:
                raise MeshNotRunning("no mesh is running for this configuration")
            self.answers -= 1
            async with inner(request, node) as answer:
                yield answer

        return send


async def test_a_mesh_that_ends_under_way_ends_the_run_and_fails_no_request() -> None:
    kept = Kept()
    async with two() as made:
        target = MortalTarget(made.mesh, answers=2 + 10 + 3 + 7)
        settings = BenchSettings(MODEL, requests=10, tokens=4, concurrency=(1, 3))
        with pytest.raises(MeshNotRunning):
            await ran(made, Scenario.SWEEP, settings, target=target, keep=kept.keep)
    assert kept.stages() == [("c=1", False), ("c=3", True)]
    partial = kept.results[-1].stages[-1]
    assert 5 <= partial.served <= 7, "those that were being answered are ended too"
    assert partial.failed == 0
    assert 1 <= partial.unfinished <= 3


async def test_replay_keeps_the_traces_times() -> None:
    trace = [TracedRequest(at / 20, 20 + at, 1 + at % 3) for at in range(8)]
    async with two() as made:
        done = await ran(made, Scenario.REPLAY, BenchSettings(MODEL, speed=2.0), trace=trace)
    (stage,) = done.result.stages
    assert (stage.kind, stage.concurrency, stage.served) == (StageKind.TRACE, None, 8)
    records = [record for record in done.records if record.stage == "replay"]
    assert [record.intended_s for record in records] == pytest.approx([at / 40 for at in range(8)])
    assert all(record.sent_s >= record.intended_s for record in records)
    assert [record.tokens for record in records] == [1 + at % 3 for at in range(8)]


async def test_one_node_as_if_it_were_the_mesh() -> None:
    async with two() as made:
        done = await ran(made, Scenario.SWEEP, BenchSettings(MODEL, tokens=2, concurrency=(2,)), only_node="beta")
        assert {record.node for record in done.records} == {"beta"}
        assert made.hosts["alpha"].counters.started == 0
        with pytest.raises(UsageError, match="there is no node 'gamma'"):
            await ran(made, Scenario.QUICK, only_node="gamma")


async def test_a_node_that_fails_is_in_the_result() -> None:
    async with two() as made:
        await made.hosts["beta"].set_faults(Faults(status=500))
        done = await ran(made, Scenario.QUICK)
    beta = named(done, "beta")
    assert (beta.served, beta.failed) == (0, 3)
    assert beta.failures
    assert any(note.startswith("beta: the warm-up request failed") for note in done.result.notes)
    assert named(done, "alpha").failed == 0
    assert named(done, "mesh").failed == 0, "the mesh uses the other"
    assert done.result.failed == 3


async def test_nobody_who_could() -> None:
    async with two() as made, SimOllama(host("gamma")) as other:
        with pytest.raises(NoNodeError, match="no node can serve 'llama3'"):
            await ran(made, Scenario.QUICK, BenchSettings("llama3"))
        async with mesh_of_nodes(node("gamma", other.url), node("gone", "http://127.0.0.1:9")) as half:
            done = await ran(half, Scenario.QUICK, BenchSettings(MODEL, requests=1, tokens=1))
            assert [stage.name for stage in done.result.stages] == ["gamma", "mesh"]
            assert any(note.startswith("gone is not measured: ") for note in done.result.notes)
            assert done.result.scaling is None, "one node has nothing to scale with"
            with pytest.raises(UsageError, match="two nodes"):
                await ran(half, Scenario.FAILOVER)
            with pytest.raises(NoNodeError, match="gone: "):
                await ran(half, Scenario.QUICK, only_node="gone")


def test_names_of_models_as_ollama_reads_them() -> None:
    assert has_model(("m:latest",), "m")
    assert has_model(("m:latest",), "m:latest")
    assert has_model(("m",), "m")
    assert not has_model(("m:7b",), "m")
    assert not has_model(("m:latest",), "m:7b")


def test_who_can_be_measured() -> None:
    def one(name: str, health: Health, phase: BackendPhase, models: tuple[str, ...]) -> NodeState:
        return NodeState(name, health, None, TunnelState("direct"), BackendState("ollama", phase, models=models))

    nodes = (
        one("fine", Health.HEALTHY, BackendPhase.UP, ("m:latest",)),
        one("slow", Health.DEGRADED, BackendPhase.UP, ("m:latest", "other")),
        one("silent", Health.HEALTHY, BackendPhase.UP, ()),
        one("without", Health.HEALTHY, BackendPhase.UP, ("other",)),
        one("down", Health.DOWN, BackendPhase.DOWN, ("m:latest",)),
        one("draining", Health.DRAINING, BackendPhase.UP, ("m:latest",)),
    )
    state = MeshState("home", datetime(2026, 11, 24, tzinfo=UTC), GatewayState(), compute_totals(nodes), nodes, ())
    assert [found.name for found in usable_nodes(state, "m")] == ["fine", "slow", "silent"]
