"""Which nodes are opened, kept and closed when mesh.yaml has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.mesh.nodes.node_changes import NodePlan, plan_nodes, replace_pool_node, with_pool_nodes
from tests.config import build

A = "{name: a, ssh: {host: h}, backend: {port: 1}}"
B = "{name: b, backend: {url: 'http://127.0.0.1:1'}}"
OFF = "{name: b, enabled: false, backend: {url: 'http://127.0.0.1:1'}}"


def plan(before: str, after: str) -> NodePlan:
    return plan_nodes(build.topology(before), build.topology(after))


def names(found: NodePlan) -> tuple[list[str], list[str], list[str], list[str]]:
    """Opened, kept, closed and reopened."""
    opened, kept = [spec.name for spec in found.opened], [spec.name for spec in found.kept]
    return opened, kept, sorted(found.closed), list(found.reopened)


def test_nodes_come_go_and_stay() -> None:
    assert names(plan(f"nodes: [{A}]\n", f"nodes: [{B}, {A}]\n")) == (["b"], ["a"], [], [])
    assert names(plan(f"nodes: [{A}, {B}]\n", f"nodes: [{B}]\n")) == ([], ["b"], ["a"], [])
    assert names(plan(f"nodes: [{B}]\n", f"nodes: [{OFF}]\n")) == (["b"], [], ["b"], [])
    assert names(plan(f"nodes: [{OFF}]\n", f"nodes: [{B}]\n")) == (["b"], [], ["b"], [])


@pytest.mark.parametrize(
    ("before", "after", "is_reopened"),
    [
        ("host: h", "host: i", True),
        ("host: h", "host: h, keepalive: 1s", True),
        ("port: 1", "port: 2", True),
        ("port: 1", "urls: ['http://127.0.0.1:1', 'http://127.0.0.1:2']", True),
        ("port: 1", "port: 1, kind: vllm", False),
        ("port: 1", "port: 1, api_key_env: K", False),
        ("port: 1", "port: 1, max_parallel: 3", False),
        ("name: a", "name: a, weight: 2, tier: 3, labels: {x: y}, expect: {gpus: 1}", False),
    ],
)
def test_only_another_way_needs_a_new_tunnel(before: str, after: str, is_reopened: bool) -> None:
    found = plan(f"nodes: [{A}, {B}]\n", f"nodes: [{A.replace(before, after)}, {B}]\n")
    assert names(found) == ((["a"], ["b"], ["a"], ["a"]) if is_reopened else ([], ["a", "b"], [], []))


def test_other_local_ends_are_those_of_all_tunnels() -> None:
    found = plan(f"nodes: [{A}, {B}]\n", f"tunnels: {{share: true}}\nnodes: [{A}, {B}]\n")
    assert names(found) == (["a"], ["b"], ["a"], ["a"])


def test_the_node_of_a_pool_stays_while_mesh_yaml_has_its_members() -> None:
    running = build.topology(f"nodes: [{A}, {B}]\n")
    pool = replace(running.nodes[1], name="big", pool_members=("a", "b"))
    with_pool = replace_pool_node(running, "big", pool)
    assert [node.name for node in with_pool.nodes] == ["a", "b", "big"]
    assert replace_pool_node(with_pool, "big", None) == running
    assert replace_pool_node(running, "b", None) == running, "another node of that name is none of the pool's"
    assert with_pool_nodes(build.topology(f"nodes: [{B}, {A}]\n"), with_pool).nodes[-1] == pool
    assert [node.name for node in with_pool_nodes(build.topology(f"nodes: [{B}]\n"), with_pool).nodes] == ["b"]
