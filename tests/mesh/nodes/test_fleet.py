"""All nodes together: names, groups, outcomes, and why none can serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.balancer.account import GpuGroup
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import ModelMissing, NoNodeError, UsageError
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.mesh.meshes import host, mesh_of_nodes, node
from tests.mesh.nodes.build import NodeEvents, OtherGateways, make_node, make_spec, take_lease


def make_fleet(*names: str) -> Fleet:
    events = NodeEvents()
    specs = [make_spec(f"http://127.0.0.1:{number + 1}", name=name) for number, name in enumerate(names)]
    return Fleet([make_node(spec, events) for spec in specs], clock=events.clock)


async def test_nodes_are_found_by_name_in_the_order_of_mesh_yaml() -> None:
    fleet = make_fleet("b", "a")
    assert [node.name for node in fleet] == ["b", "a"]
    assert [candidate.name for candidate in fleet.candidates()] == ["b", "a"]
    assert fleet.find_node("a") is fleet["a"]
    assert fleet.require_known(None) is None
    with pytest.raises(UsageError, match="there is no node 'x'") as unknown:
        fleet.find_node("x")
    assert unknown.value.hint == "the nodes are: b, a"
    assert repr(fleet) == "<Fleet 2 nodes, 0 reachable>"


async def test_two_nodes_that_reach_one_server_are_one_group() -> None:
    async with SimOllama(host("a")) as server, mesh_of_nodes(node("x", server.url), node("y", server.url)) as mesh:
        fleet = mesh.mesh.fleet
        fleet.regroup()
        (group,) = {entry.account.group for entry in fleet}
        assert (group.name, [account.name for account in group.accounts]) == ("x", ["x", "y"])


async def test_outcomes_are_told_by_node() -> None:
    fleet = make_fleet("a", "b")
    for lease in [take_lease(fleet["a"], Demand(model="m"), 100.0) for _ in range(2)]:
        lease.release(Outcome.SERVED)
    assert fleet.attempt_outcomes == {"a": {Outcome.SERVED: 2}, "b": {}}


async def test_other_gateways_count_once_for_a_group() -> None:
    events, others = NodeEvents(), OtherGateways(5)
    specs = [make_spec(f"http://127.0.0.1:{port}", name=name) for name, port in (("a", 1), ("b", 2), ("c", 3))]
    fleet = Fleet([make_node(spec, events, coordination=others) for spec in specs], clock=events.clock)
    group = GpuGroup("a", [fleet["a"].account, fleet["b"].account])
    fleet["a"].account.group = fleet["b"].account.group = group
    fleet.update_other_loads()
    assert [node.account.count() for node in fleet] == [5, 5, 5]
    others.load, others.keys = 0, []
    fleet.update_other_loads()
    assert [node.account.count() for node in fleet] == [0, 0, 0]
    assert others.keys == [fleet["a"].coordination_key, fleet["c"].coordination_key]


async def test_why_no_node_can_serve_names_each_nodes_reason() -> None:
    fleet = make_fleet("a", "b")
    error = fleet.explain_no_node(Demand(model="m"))
    assert type(error) is NoNodeError
    assert "a: not opened yet; b: not opened yet" in error.message
    one = fleet.explain_no_node(Demand(model="m", node="b"))
    assert "a: " not in one.message


async def test_a_model_that_no_node_has_is_named_as_missing() -> None:
    async with SimOllama(host("a")) as server, mesh_of_nodes(node("x", server.url)) as mesh:
        assert isinstance(mesh.mesh.fleet.explain_no_node(Demand(model="other")), ModelMissing)


async def test_local_ports_are_those_of_tunnels_on_loopback() -> None:
    fleet = make_fleet("a", "b")
    assert fleet.local_ports() == frozenset()
    fleet["b"].tunnel = DirectTunnel(fleet["b"].spec, on_change=fleet["b"].on_tunnel)
    assert fleet.local_ports() == {2}


async def test_the_requests_of_a_pool_and_of_its_members_count_for_each_other() -> None:
    events = NodeEvents()
    specs = [make_spec(f"http://127.0.0.1:{number + 1}", name=name) for number, name in enumerate(("a", "b", "c"))]
    pool = replace(make_spec("http://127.0.0.1:9", name="big"), pool_members=("a", "b"))
    fleet = Fleet([make_node(spec, events) for spec in (*specs, pool)], clock=events.clock)
    fleet.regroup()
    leases = [take_lease(fleet["big"], Demand(model="m"), 100.0), take_lease(fleet["b"], Demand(model="n"), 100.0)]
    counts = {node.name: node.account.count() for node in fleet}
    assert counts == {"a": 1, "b": 2, "c": 0, "big": 2}, "two members are no group of their own"
    for lease in leases:
        lease.release(Outcome.SERVED)
