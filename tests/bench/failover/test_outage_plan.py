"""Which node goes away, and how, by what a person asks for and by what the mesh has."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gpumesh.bench.failover.outage_plan import OutagePlan, choose_node, plan_outage
from gpumesh.errors import UsageError
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.state import BackendState, GatewayState, Health, LoadState, MeshState, NodeState, TunnelState
from gpumesh.state import compute_totals as totals

NAMES = ("near", "far", "farther")


def state(*transports: str) -> MeshState:
    nodes = tuple(
        NodeState(name, Health.HEALTHY, None, TunnelState(kind), BackendState("ollama"), load=LoadState(number))
        for number, (name, kind) in enumerate(zip(NAMES, transports, strict=True))
    )
    return MeshState("home", datetime.now(UTC), GatewayState(), totals(nodes), nodes)


MIXED, DIRECT = state("direct", "sshtunnel", "openssh"), state("direct", "direct", "direct")


def kind_of(plan: OutagePlan, mesh: MeshState = MIXED, *, embedded: bool = False) -> OutageKind:
    return plan_outage(plan, mesh, NAMES, embedded=embedded).kind


def test_a_tunnel_is_cut_where_there_is_one_and_else_a_node_is_drained() -> None:
    assert kind_of(OutagePlan()) is OutageKind.TUNNEL
    assert kind_of(OutagePlan(), DIRECT) is OutageKind.DRAIN
    assert kind_of(OutagePlan(node="near")) is OutageKind.DRAIN
    assert choose_node(OutagePlan(), OutageKind.TUNNEL, MIXED, NAMES[:2]) == "far", "the busiest that has a tunnel"
    assert choose_node(OutagePlan(), OutageKind.DRAIN, MIXED, NAMES) == "farther"
    assert choose_node(OutagePlan(node="near"), OutageKind.DRAIN, MIXED, NAMES) == "near"


def test_what_cannot_be_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises(UsageError, match="no tunnel to close"):
        kind_of(OutagePlan(OutageKind.TUNNEL), DIRECT)
    with pytest.raises(UsageError, match="no node 'moon'"):
        kind_of(OutagePlan(node="moon"))
    with pytest.raises(UsageError, match="needs --stop-command and --start-command"):
        kind_of(OutagePlan(OutageKind.SERVER, stop_command="x"))
    with pytest.raises(UsageError, match="are for --by server"):
        kind_of(OutagePlan(stop_command="x", start_command="y"))
    by_server = OutagePlan(OutageKind.SERVER, None, "stop", "start")
    assert plan_outage(by_server, MIXED, NAMES, embedded=False) == Outage(OutageKind.SERVER, "stop", "start")
    with pytest.raises(UsageError, match="needs a running mesh"):
        kind_of(by_server, embedded=True)
