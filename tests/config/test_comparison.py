"""What is different between the mesh.yaml that a mesh has read and the file now."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from gpumesh.config.comparison import Differences, compare_topologies, describe_differences
from gpumesh.state import Severity
from gpumesh.topology import NodeSpec, Topology
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
    ("before", "after", "change", "changes_routes"),
    [
        ("port: 22", "port: 23", "ssh.port 22 -> 23", True),
        ("host: h", "host: i", "ssh.host h -> i", True),
        ("host: h", "host: h, keepalive: 500ms", "ssh.keepalive 2s -> 500ms", True),
        ("host: h", "host: h, identity_file: /k", "ssh.identity_file not set -> /k", True),
        ("port: 1}", "port: 2}", "backend.urls http://127.0.0.1:1 -> http://127.0.0.1:2", True),
        ("name: a,", "name: a, enabled: false,", "enabled true -> false", True),
        ("name: a,", "name: a, expect: {gpus: 1},", "expect.gpus not set -> 1", False),
        ("name: a,", "name: a, weight: 2.5,", "weight 1 -> 2.5", False),
        ("name: a,", "name: a, tier: 2,", "tier 1 -> 2", False),
        ("site: home", "site: work", "labels.site home -> work", False),
        ("name: a,", "name: a, address_from: {command: [secret]},", "address_from", True),
    ],
)
def test_each_key_of_a_node_counts(before: str, after: str, change: str, changes_routes: bool) -> None:
    assert before in NODE
    found = of_node(NODE.replace(before, after))
    assert [str(node) for node in found.changed] == [f"a: {change}"]
    assert found.change_routes is changes_routes
    key = change.partition(" ")[0]
    section = key.partition(".")[0]
    assert found.change_expectations_only is (section == "expect")
    finding = describe_differences(found)
    assert finding is not None
    assert (finding.code, finding.severity) == (
        "config-changed",
        Severity.INFO if section == "expect" else Severity.WARNING,
    )
    assert finding.message.endswith(f": a has another {key}"), "without the values"


def test_a_node_that_gets_its_first_section_has_one_change() -> None:
    found = differences(f"nodes: [{OTHER}]\n", "nodes: [{name: b, ssh: {host: h}, backend: {port: 1}}]\n")
    assert [str(node) for node in found.changed] == ["b: ssh not set -> given"]


def test_no_section_of_a_node_is_left_out() -> None:
    """A new field of NodeSpec has to be thought of here: does it lead to another host?"""
    known = {"name", "backend", "ssh", "expect", "weight", "labels", "enabled", "tier", "eur_per_hour"}
    known |= {"pool_members"}  # of the node of a running pool, which is not in mesh.yaml
    assert {field.name for field in fields(NodeSpec)} == known


def test_nodes_that_come_and_go_lead_to_other_hosts() -> None:
    found = differences(f"nodes: [{NODE}]\n", f"nodes: [{OTHER}]\n")
    assert (found.added, found.removed, found.changed) == (("b",), ("a",), ())
    assert found.change_routes
    assert not found.change_expectations_only
    assert str(found) == "b is not in the running mesh; a is not in mesh.yaml any more"


@pytest.mark.parametrize(
    ("change", "text", "changes_routes"),
    [
        (
            "gateway.listen 127.0.0.1:11430 -> 127.0.0.1:1, unix:/s",
            "gateway: {listen: ['127.0.0.1:1', 'unix:/s']}",
            False,
        ),
        ("gateway.route_priority", "gateway: {route_priority: {/api/embed: batch}}", False),
        ("gateway.timeout 10m -> 5s", "gateway: {timeout: 5s}", False),
        ("gateway.reload auto -> manual", "gateway: {reload: manual}", False),
        ("gateway.keys", "gateway: {keys: [{name: k, env: K}]}", False),
        ("tunnels.listen tcp -> unix", "tunnels: {listen: unix}", True),
        ("redis not set -> given", "redis: {url: 'redis://localhost'}", False),
        ("name mesh -> another", "name: another", False),
        ("notify", "notify: [{webhook: 'https://example.org/secret'}]", False),
    ],
)
def test_each_key_of_the_mesh_counts(change: str, text: str, changes_routes: bool) -> None:
    found = differences(f"nodes: [{NODE}]\n", f"{text}\nnodes: [{NODE}]\n")
    assert [str(key) for key in found.mesh_keys] == [change]
    assert found.change_routes is changes_routes
    assert not found.change_expectations_only
    assert str(found) == f"another {change.partition(' ')[0]}"


def test_no_section_of_the_mesh_is_left_out() -> None:
    """A new section is compared as a whole, without its values, until somebody names its keys."""
    topology = build.topology(f"nodes: [{NODE}]\n")
    with_keys = {"nodes", "models", "pools", "gateway", "tunnels", "redis", "source"}
    for name in {field.name for field in fields(Topology)} - with_keys:
        change: dict[str, Any] = {name: ("other",)}
        found = compare_topologies(topology, replace(topology, **change))
        assert [change.key for change in found.mesh_keys] == [name]


def test_rules_for_models_are_compared_one_by_one() -> None:
    before = f"models: {{m: {{aliases: [n]}}, gone: {{pinned: true}}}}\nnodes: [{NODE}]\n"
    found = differences(before, f"models: {{m: {{copies: 1}}, new: {{pinned: true}}}}\nnodes: [{NODE}]\n")
    assert (found.models_added, found.models_removed) == (("new",), ("gone",))
    assert [str(model) for model in found.models_changed] == ["m: copies not set -> 1, aliases n -> not set"]
    assert found.change_models
    assert not found.change_expectations_only
    assert str(found) == (
        "rules for the model new; no rules for the model gone any more; the model m has another copies and aliases"
    )


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
