"""What is different between the mesh.yaml that a mesh has read and the file now."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gpumesh.config.comparison import Differences, compare_topologies, describe_differences
from gpumesh.state import Severity
from gpumesh.topology import NodeSpec
from gpumesh.wire import from_json, to_json
from tests.config import build

NODE = "{name: a, ssh: {host: h, port: 22}, backend: {port: 1}, labels: {site: home}}"
OTHER = "{name: b, backend: {url: 'http://127.0.0.1:1'}}"


def differences(before: str, after: str) -> Differences:
    return compare_topologies(build.topology(before), build.topology(after))


def of_node(after: str) -> Differences:
    return differences(f"nodes: [{NODE}, {OTHER}]\n", f"nodes: [{after}, {OTHER}]\n")


@pytest.mark.parametrize(
    "after",
    [
        f"# a comment\nnodes: [{NODE}, {OTHER}]\n",
        f"nodes: [{OTHER}, {NODE}]\n",
        f"version: 1\ndefaults: {{ssh: {{port: 22}}}}\nnodes:\n- {NODE}\n- {OTHER}\n",
    ],
    ids=["comment", "order", "defaults"],
)
def test_what_means_the_same_is_no_difference(after: str) -> None:
    found = differences(f"nodes: [{NODE}, {OTHER}]\n", after)
    assert not found
    assert describe_differences(found) is None


@pytest.mark.parametrize(
    ("before", "after", "section", "changes_routes"),
    [
        ("port: 22", "port: 23", "ssh", True),
        ("port: 1}", "port: 2}", "backend", True),
        ("name: a,", "name: a, enabled: false,", "enabled", True),
        ("name: a,", "name: a, expect: {gpus: 1},", "expect", False),
        ("name: a,", "name: a, weight: 2,", "weight", False),
        ("name: a,", "name: a, tier: 2,", "tier", False),
        ("site: home", "site: work", "labels", False),
    ],
)
def test_each_section_of_a_node_counts(before: str, after: str, section: str, changes_routes: bool) -> None:
    assert before in NODE
    found = of_node(NODE.replace(before, after))
    assert [(node.name, node.sections) for node in found.changed] == [("a", (section,))]
    assert found.change_routes is changes_routes
    assert found.change_expectations_only is (section == "expect")
    finding = describe_differences(found)
    assert finding is not None
    assert (finding.code, finding.severity) == (
        "config-changed",
        Severity.INFO if section == "expect" else Severity.WARNING,
    )
    assert f"a has another {section}" in finding.message


def test_no_section_of_a_node_is_left_out() -> None:
    """A new field of NodeSpec has to be thought of here: does it lead to another host?"""
    known = {"name", "backend", "ssh", "expect", "weight", "labels", "enabled", "tier"}
    assert {field.name for field in fields(NodeSpec)} == known


def test_nodes_that_come_and_go_lead_to_other_hosts() -> None:
    found = differences(f"nodes: [{NODE}]\n", f"nodes: [{OTHER}]\n")
    assert (found.added, found.removed, found.changed) == (("b",), ("a",), ())
    assert found.change_routes
    assert not found.change_expectations_only
    assert str(found) == "b is not in the running mesh; a is not in mesh.yaml any more"


@pytest.mark.parametrize(
    ("section", "text", "changes_routes"),
    [
        ("gateway", "gateway: {listen: '127.0.0.1:1'}", False),
        ("gateway", "gateway: {route_priority: {/api/embed: batch}}", False),
        ("tunnels", "tunnels: {listen: unix}", True),
        ("models", "models: {m: {aliases: [n]}}", False),
        ("redis", "redis: {url: 'redis://localhost'}", False),
        ("name", "name: another", False),
    ],
)
def test_each_section_of_the_mesh_counts(section: str, text: str, changes_routes: bool) -> None:
    found = differences(f"nodes: [{NODE}]\n", f"{text}\nnodes: [{NODE}]\n")
    assert found.mesh_sections == (section,)
    assert found.change_routes is changes_routes
    assert not found.change_expectations_only
    assert str(found) == f"another {section}"


def test_a_topology_that_came_over_the_control_socket_is_the_same() -> None:
    text = (
        "gateway: {route_priority: {/api/embed: batch}, keys: [{name: k, env: K, models: [m]}]}\n"
        "models: {m: {context_steps: [4096], pinned: true}}\n"
        f"nodes: [{NODE}, {OTHER}]\n"
    )
    topology = build.topology(text)
    received = from_json(type(topology), to_json(topology))
    assert received == topology
    assert not compare_topologies(received, topology)
