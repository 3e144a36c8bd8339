"""Snapshots by themselves: made from reports and tunnel states that a test sets, without probes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from socket import gethostname

import pytest

from gpumesh.balancer.breaker import THRESHOLD, Breaker
from gpumesh.balancer.outcomes import Blame
from gpumesh.balancer.outliers import Slowness
from gpumesh.errors import SecretMissing
from gpumesh.mesh.nodes.ledger import Ledger
from gpumesh.mesh.nodes.prober import NodeReports, Prober
from gpumesh.mesh.nodes.rate_meter import RateMeter
from gpumesh.mesh.nodes.snapshot import MAX_KEY_CHARS, NodeRole, SnapshotBuilder, coordination_key
from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.probes.backend import BackendReport
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import (
    BackendPhase,
    BackendState,
    BrokenModelState,
    GpuState,
    Health,
    SlownessState,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import AddressCommand, BackendKind, BackendSpec, NodeSpec, SshSpec, Target
from tests.http_clients import loopback_client
from tests.mesh.nodes.build import NodeEvents, OtherGateways, make_scheduler

TARGET = Target("127.0.0.1", 11434)
SPEC = NodeSpec("one", BackendSpec(targets=(TARGET,)))
UP = TunnelState("direct", TunnelPhase.UP, rtt_ms=7.0)
SERVER = BackendReport(BackendState("ollama", BackendPhase.UP, version="0.12.6"), url="http://127.0.0.1:1")
PROBED = NodeReports(
    SERVER, kind=BackendKind.OLLAMA, models=frozenset({"m:latest"}), loaded=frozenset({"m:latest"}), target=TARGET
)


@dataclass
class SnapshotDesk:
    spec: NodeSpec = SPEC
    events: NodeEvents = field(default_factory=NodeEvents)
    others: OtherGateways = field(default_factory=OtherGateways)

    def __post_init__(self) -> None:
        self.role = NodeRole()
        scheduler = make_scheduler()
        self.link = TunnelLink(self.spec)
        self.meter = RateMeter(self.events.clock)
        self.ledger = Ledger(
            scheduler.roster.add(self.spec.name, max_parallel=self.spec.backend.max_parallel),
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
            http=loopback_client(),
            on_report=lambda: None,
        )
        self.builder = SnapshotBuilder(
            self.spec,
            self.role,
            self.link,
            self.prober,
            self.ledger,
            meter=self.meter,
            clock=self.events.clock,
            coordination=self.others,
        )

    def set_up(self, reports: NodeReports = PROBED, tunnel: TunnelState = UP) -> None:
        self.link.update(tunnel)
        self.prober.reports = reports


@pytest.fixture
async def desk() -> SnapshotDesk:
    return SnapshotDesk()


async def test_a_candidate_is_made_of_reports_link_and_ledger(desk: SnapshotDesk) -> None:
    desk.set_up()
    candidate = desk.builder.candidate(desk.events.now, despite_breaker=False)
    assert candidate.usable
    assert (candidate.kind, candidate.models) == (BackendKind.OLLAMA, PROBED.models)


async def test_an_open_breaker_makes_it_unusable_unless_that_is_asked_for(desk: SnapshotDesk) -> None:
    desk.set_up()
    desk.ledger.breaker = Breaker(THRESHOLD, desk.events.now + 30.0)
    assert not desk.builder.candidate(desk.events.now, despite_breaker=False).usable
    assert desk.builder.candidate(desk.events.now, despite_breaker=True).usable
    assert desk.builder.may_recover(None)


async def test_a_broken_model_is_in_the_candidate_and_the_state(desk: SnapshotDesk) -> None:
    desk.set_up()
    now, models = desk.events.now, desk.ledger.model_breakers
    for _ in range(3):
        models.record_failure("m:latest", Blame.MODEL, "", now)
    assert desk.builder.candidate(now, despite_breaker=False).broken_models == {"m:latest"}
    assert desk.builder.candidate(now, despite_breaker=False).usable
    assert desk.builder.candidate(now, despite_breaker=True).broken_models == set(), "the reason is not known"
    assert desk.builder.may_recover("M"), "the pause ends soon"
    assert not desk.builder.may_recover("n")
    state = desk.builder.state(queued=0)
    assert state.broken_models == (BrokenModelState("m:latest", "model", None, 5.0),)
    assert [found.code for found in state.noticed] == ["model-unloadable"]
    models.record_failure("m:latest", Blame.MODEL_LOAD, "out of memory", now + 5.0)
    assert not desk.builder.may_recover("m"), "10 s is too long to wait for"
    assert desk.builder.candidate(now, despite_breaker=True).broken_models == {"m:latest"}


async def test_a_slow_node_is_shown_with_its_figures(desk: SnapshotDesk) -> None:
    desk.set_up()
    assert desk.builder.state(queued=0).slowness is None
    desk.role.slowness = Slowness(2.3456, None, 3.0)
    assert desk.builder.state(queued=0).slowness == SlownessState(2.35, None, 3.0)


async def test_other_gateways_are_asked_for_by_the_nodes_key(desk: SnapshotDesk) -> None:
    desk.set_up()
    assert desk.builder.other_gateways_in_flight == 5
    assert desk.others.keys == [f"{gethostname()}/{TARGET.url}"]


@pytest.mark.parametrize(
    ("phase", "reports", "expected"),
    [
        (TunnelPhase.IDLE, NodeReports(), True),
        (TunnelPhase.CONNECTING, NodeReports(), True),
        (TunnelPhase.UP, NodeReports(), True),
        (TunnelPhase.UP, replace(PROBED, backend=BackendReport(BackendState("ollama", BackendPhase.DOWN))), False),
        (TunnelPhase.BACKOFF, NodeReports(), False),
        (TunnelPhase.BACKOFF, replace(PROBED, backend=None), True),
        (TunnelPhase.FAILED, replace(PROBED, backend=None), False),
    ],
)
async def test_which_nodes_may_recover(
    desk: SnapshotDesk, phase: TunnelPhase, reports: NodeReports, expected: bool
) -> None:
    desk.set_up(reports, TunnelState("direct", phase))
    assert not desk.builder.reachable
    assert desk.builder.may_recover(None) is expected
    desk.role.drained = True
    assert not desk.builder.may_recover(None)


async def test_a_missing_secret_is_the_reason_and_a_finding(desk: SnapshotDesk) -> None:
    missing = SecretMissing("KEY is not set", node="one")
    desk.set_up(NodeReports(missing_secret=missing))
    state = desk.builder.state(0)
    assert (state.health, state.reason) == (Health.DOWN, "KEY is not set")
    assert state.backend.last_error == "KEY is not set"
    assert [finding.code for finding in state.noticed] == [missing.code]


async def test_tokens_per_s_is_unknown_until_something_was_served(desk: SnapshotDesk) -> None:
    desk.set_up()
    assert desk.builder.state(0).backend.tokens_per_s is None
    desk.meter.add(10)
    assert desk.builder.state(0).backend.tokens_per_s == 10.0


async def test_nothing_of_the_host_is_shown_while_the_tunnel_is_down(desk: SnapshotDesk) -> None:
    desk.set_up(tunnel=TunnelState("direct", TunnelPhase.BACKOFF, last_error="gone"))
    state = desk.builder.state(0)
    assert (state.health, state.reason) == (Health.DOWN, "gone")
    assert state.backend.version is None
    assert state.noticed == ()


def gpus(*uuids: str) -> GpuReport:
    return GpuReport(tuple(GpuState(index, uuid, "4090") for index, uuid in enumerate(uuids)))


def test_the_coordination_key_names_the_gpus_in_any_order() -> None:
    one = coordination_key(SPEC, NodeReports(gpus=gpus("GPU-b", "GPU-a")))
    other = coordination_key(SPEC, NodeReports(gpus=gpus("GPU-a", "GPU-b")))
    assert one == other == "GPU-a+GPU-b"
    many = coordination_key(SPEC, NodeReports(gpus=gpus(*(f"GPU-{number:036}" for number in range(100)))))
    assert len(many) <= MAX_KEY_CHARS


def test_the_coordination_key_of_a_host_without_gpus_is_its_address() -> None:
    here = coordination_key(SPEC, NodeReports())
    assert here == f"{gethostname()}/http://127.0.0.1:11434", "each machine has its own server there"
    there = replace(SPEC, backend=replace(SPEC.backend, targets=(Target("10.0.0.5", 11434),)))
    assert coordination_key(there, NodeReports()) == "http://10.0.0.5:11434"
    over_ssh = replace(SPEC, ssh=SshSpec(host="example.org", port=2222))
    assert coordination_key(over_ssh, NodeReports(gpus=GpuReport())) == "example.org:2222/http://127.0.0.1:11434"


def test_hosts_without_gpus_are_told_apart() -> None:
    def key(ssh: SshSpec) -> str:
        return coordination_key(replace(SPEC, ssh=ssh), NodeReports(gpus=GpuReport()))

    ssh = SshSpec("10.0.0.5", 22)
    pods = [SshSpec("", address_from=AddressCommand(("pod-address", name, "--token=secret"))) for name in ("a", "b")]
    several = [ssh, replace(ssh, port=23), *(replace(ssh, proxy_jump=(jump,)) for jump in ("one", "two:23")), *pods]
    assert len({key(host) for host in several}) == len(several)
    assert not any("secret" in key(host) for host in several)


async def test_the_coordination_key_follows_the_reports(desk: SnapshotDesk) -> None:
    assert desk.builder.coordination_key == f"{gethostname()}/{TARGET.url}"
    desk.set_up(replace(PROBED, gpus=gpus("GPU-1")))
    assert desk.builder.coordination_key == "GPU-1"
    desk.set_up(replace(PROBED, gpus=GpuReport()))
    assert desk.builder.coordination_key == "GPU-1", "nvidia-smi has failed, and others still see the GPU"
    desk.set_up(PROBED)
    assert desk.builder.coordination_key == "GPU-1", "the tunnel is new"
    desk.set_up(replace(PROBED, gpus=gpus("GPU-2")))
    assert desk.builder.coordination_key == "GPU-2"
