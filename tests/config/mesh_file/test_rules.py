from __future__ import annotations

from typing import Any

import pytest

from gpumesh.config.mesh_file.rules import find_broken_rules

SSH = {"host": "h"}
DIRECT = {"name": "a", "backend": {"url": "http://h:1"}}


def told(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(".".join(map(str, path)), message) for path, message in find_broken_rules(document)]


@pytest.mark.parametrize(
    "node",
    [
        DIRECT,
        {"name": "a", "ssh": SSH},
        {"name": "a", "ssh": {"alias": "work"}},
        {"name": "a", "ssh": SSH, "backend": {"port": 80}},
        {"name": "a", "address_from": {"command": "x"}},
        {"name": "a", "ssh": SSH, "backend": {"kind": "openai", "port": "8000"}},
        {"name": "a", "backend": {"urls": ["http://h:1", "http://h:2"]}},
    ],
)
def test_what_holds(node: dict[str, Any]) -> None:
    assert told({"nodes": [node]}) == []


@pytest.mark.parametrize(
    ("document", "where", "said"),
    [
        ({}, "nodes", "names no node"),
        ({"nodes": []}, "nodes", "names no node"),
        ({"nodes": {"iceland": {}}}, "nodes", "nodes are a list: write `- name: iceland`"),
        ({"nodes": {"\x1b[31m": {}}}, "nodes", "nodes are a list: write `- name: iceland`"),
        ({"nodes": [DIRECT, DIRECT]}, "nodes.1.name", "'a' is the name of nodes[0] already"),
        ({"nodes": [{"name": "a"}]}, "nodes.0", "has neither `ssh` nor a URL"),
        ({"nodes": [{"name": "a", "backend": {"port": "1"}}]}, "nodes.0.backend.port", "as seen from an ssh host"),
        ({"nodes": [{"name": "a", "ssh": {}}]}, "nodes.0.ssh", "does not say which host"),
        ({"nodes": [{"name": "a", "ssh": SSH, "backend": {"kind": "openai"}}]}, "nodes.0.backend", "no usual port"),
        (
            {"nodes": [{**DIRECT, "ssh": SSH, "backend": {"url": "http://h", "port": "1"}}]},
            "nodes.0.backend.port",
            "url stands here already",
        ),
        ({"nodes": [{**DIRECT, "backend": {"urls": []}}]}, "nodes.0.backend.urls", "names no URL"),
        ({"nodes": [DIRECT], "gateway": {"listen": "0.0.0.0:1"}}, "gateway.listen", "lets other machines use"),
        (
            {"nodes": [DIRECT], "gateway": {"listen": ["unix:/x", "0.0.0.0:1"]}},
            "gateway.listen.1",
            "lets other machines",
        ),
        ({"nodes": [DIRECT], "gateway": {"listen": ["1", "2"]}}, "gateway.listen.1", "'1' stands here already"),
        ({"nodes": [DIRECT], "gateway": {"listen": ["unix:/x", "unix:/y"]}}, "gateway.listen.1", "one unix:PATH"),
        ({"nodes": [DIRECT], "gateway": {"listen": []}}, "gateway.listen", "names no address"),
        ({"nodes": [DIRECT], "tunnels": {"listen": "unix", "share": "true"}}, "tunnels.share", "cannot hold"),
        ({"nodes": [DIRECT], "defaults": {"backend": {"port": "1", "url": "x"}}}, "defaults.backend.url", "one of"),
    ],
)
def test_what_does_not_hold_has_its_place(document: dict[str, Any], where: str, said: str) -> None:
    assert [(place, said in message) for place, message in told(document)] == [(where, True)]


def test_defaults_count() -> None:
    assert told({"defaults": {"ssh": {"host": "h"}}, "nodes": [{"name": "a", "ssh": {}}]}) == []
    shared = {"backend": {"kind": "openai", "port": "8000"}}
    assert told({"defaults": shared, "nodes": [{"name": "a", "ssh": SSH}]}) == []


def test_a_key_keeps_others_out() -> None:
    assert told({"nodes": [DIRECT], "gateway": {"listen": "0.0.0.0:1", "api_key_env": "KEY"}}) == []


@pytest.mark.parametrize("odd", [None, 5, "x", [], {}, [5], [None], ["x"], [[]]])
def test_anything_may_be_of_the_wrong_form(odd: Any) -> None:
    """That is told elsewhere."""
    for key in ("nodes", "gateway", "tunnels", "defaults", "redis"):
        list(find_broken_rules({"nodes": [DIRECT], key: odd}))
    list(
        find_broken_rules({"nodes": [DIRECT], "gateway": {"listen": odd}, "tunnels": {"listen": "unix", "share": odd}})
    )
    for key in ("name", "ssh", "backend", "address_from"):
        list(find_broken_rules({"nodes": [{**DIRECT, key: odd}]}))
