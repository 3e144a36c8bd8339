"""Each way to a server by itself, over real sockets."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.probes import routes
from gpumesh.probes.routes import list_backend_routes, probe_routes
from gpumesh.state import BackendPhase, BackendState, Health, NodeState, RouteState, TunnelPhase, TunnelState
from gpumesh.topology import AddressCommand, BackendKind, BackendSpec, NodeSpec, SshSpec, Target
from tests.mesh.servers import Exchange, ScriptedServer, serve, whole_response

PATIENCE_S = 20.0
SSH = SshSpec("127.0.0.1", 22)


def ssh_node(
    *urls: str, ports: tuple[int, ...] = (), ssh: SshSpec | None = SSH, **changes: Any
) -> tuple[NodeSpec, NodeState]:
    """An SSH node whose tunnel ends at ``urls``; ``ports`` are its targets' on the host. The first is in use."""
    targets = tuple(Target("127.0.0.1", port) for port in ports or range(1, len(urls) + 1))
    ways = tuple(RouteState(target.url, url, "sshtunnel") for target, url in zip(targets, urls, strict=True))
    state = NodeState(
        "iceland",
        Health.HEALTHY,
        None,
        TunnelState("sshtunnel", TunnelPhase.UP),
        BackendState("ollama", BackendPhase.UP, url=urls[0]),
        routes=ways,
    )
    return NodeSpec("iceland", BackendSpec(targets=targets, **changes), ssh=ssh), state


async def probe(client: httpx.AsyncClient, node: tuple[NodeSpec, NodeState], **more: Any) -> tuple[RouteState, ...]:
    return await probe_routes(client, *node, **{"api_key": None, "timeout_s": PATIENCE_S, **more})


# -- which ways there are --------------------------------------------------------------------------------------------


def test_the_candidates_come_before_the_hosts_own_address() -> None:
    spec, state = ssh_node("http://127.0.0.1:40001", "http://127.0.0.1:40002", ssh=SshSpec("203.0.113.7", 13323))
    assert [(way.target.port, way.url, way.via, way.offered) for way in list_backend_routes(spec, state)] == [
        (1, "http://127.0.0.1:40001", "sshtunnel", False),
        (2, "http://127.0.0.1:40002", "sshtunnel", False),
        (1, "http://203.0.113.7:1", "direct", True),
        (2, "http://203.0.113.7:2", "direct", True),
    ]


@pytest.mark.parametrize(
    "ssh",
    [
        None,
        replace(SSH, proxy_jump=("bastion",)),
        replace(SSH, host="", alias="box"),
        replace(SSH, address_from=AddressCommand(("pod",))),
    ],
)
def test_no_address_is_guessed(ssh: SshSpec | None) -> None:
    spec, state = ssh_node("http://127.0.0.1:40001", ssh=ssh)
    assert [way.offered for way in list_backend_routes(spec, state)] == [False]


def test_a_server_elsewhere_in_the_hosts_network_is_not_offered() -> None:
    spec, state = ssh_node("http://127.0.0.1:40001")
    there = replace(spec, backend=BackendSpec(targets=(Target("10.0.0.7", 80),)))
    assert [way.offered for way in list_backend_routes(there, replace(state, routes=()))] == []


def test_a_candidate_without_a_url_is_no_route() -> None:
    spec, state = ssh_node("http://127.0.0.1:40001", ssh=None)
    assert list_backend_routes(spec, replace(state, routes=())) == ()


# -- what they lead to -----------------------------------------------------------------------------------------------


async def test_each_candidate_has_its_own_state(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one, SimOllama(profile.make_host("two")) as two:
        found = await probe(client, ssh_node(one.url, two.url, "http://127.0.0.1:1", ssh=None))
    first, second, dead = found
    assert [route.state for route in found] == [BackendPhase.UP, BackendPhase.UP, BackendPhase.DOWN]
    assert first.latency_ms is not None
    assert first.latency_ms > 0
    assert first.store is not None
    assert first.store != second.store, "two hosts stored their models at different moments"
    assert (dead.latency_ms, dead.store, dead.kind) == (None, None, None)
    assert (dead.error_code, dead.target) == ("backend-down", "http://127.0.0.1:3")
    assert dead.error is not None
    assert dead.error.startswith("http://127.0.0.1:3: ")


async def test_two_routes_to_one_server_have_one_store(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one:
        first, second = await probe(client, ssh_node(one.url, one.url, ssh=None))
    assert first.store == second.store is not None


async def test_a_route_without_ssh_is_reported_when_it_leads_to_the_same_server(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one:
        _, direct = await probe(client, ssh_node(one.url, ports=(one.port,)))
    assert (direct.via, direct.offered, direct.exposed) == ("direct", True, False)
    assert (direct.target, direct.url) == (one.url, one.url), "it is another place than the target on the host"
    assert direct.latency_ms is not None


async def test_a_route_without_ssh_to_another_server_is_not_reported(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one, SimOllama(profile.make_host("two")) as two:
        (only,) = await probe(client, ssh_node(one.url, ports=(two.port,)))
    assert not only.offered


async def test_a_route_without_ssh_to_no_server_is_not_reported(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one:
        (only,) = await probe(client, ssh_node(one.url, ports=(1,)))
    assert only.state is BackendPhase.UP


async def test_without_a_store_this_machines_own_server_is_not_taken_for_the_hosts(client: httpx.AsyncClient) -> None:
    """Two llama-servers with one model: that the host's address is this machine's says nothing."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(json.dumps({"data": [{"id": "tiny"}]}).encode()))

    async with serve(script) as server:
        (only,) = await probe(client, ssh_node(server.url, ports=(server.port,), kind=BackendKind.OPENAI))
    assert not only.offered


async def test_no_key_is_sent_by_a_route_that_is_not_in_mesh_yaml(client: httpx.AsyncClient) -> None:
    keys: dict[str, set[bool]] = {"chosen": set(), "offered": set()}

    async def script(exchange: Exchange, name: str) -> None:
        keys[name].add(b"authorization" in exchange.head.lower())
        body = {"version": "1", "models": [{"name": "m", "modified_at": "2026-01-01T00:00:00.123456789Z"}]}
        await exchange.send(whole_response(json.dumps(body).encode()))

    async with (
        serve(lambda exchange: script(exchange, "chosen")) as chosen,
        serve(lambda exchange: script(exchange, "offered")) as offered,
    ):
        _, direct = await probe(client, ssh_node(chosen.url, ports=(offered.port,)), api_key="secret")
    assert direct.offered
    assert keys == {"chosen": {True}, "offered": {False}}


async def test_a_server_of_another_kind_is_recognised(client: httpx.AsyncClient) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.head.startswith(b"GET /v1/models"):
            await exchange.send(whole_response(json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode()))
        else:
            await exchange.send(whole_response(b'{"error":{"message":"not found"}}', status="404 Not Found"))

    async with serve(script) as server:
        spec, state = ssh_node(server.url, ssh=None, kind=BackendKind.OLLAMA)
        (only,) = await probe(client, (spec, replace(state, backend=BackendState("ollama"))))
    assert (only.state, only.error_code, only.kind) == (BackendPhase.DOWN, "wrong-server", "openai")


async def test_a_route_that_hangs_takes_no_longer_than_the_timeout(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one, SimOllama(profile.make_host("two")) as two:
        await two.set_faults(profile.Faults(hang=True))
        loop = asyncio.get_running_loop()
        began = loop.time()
        first, second = await probe(client, ssh_node(one.url, two.url, ssh=None), timeout_s=1.0)
        assert loop.time() - began < 15.0
    assert (first.state, second.state) == (BackendPhase.UP, BackendPhase.DOWN)
    assert first.latency_ms is not None, "it was measured all the same"
    assert second.error is not None
    assert "1 s" in second.error


async def test_the_latency_is_the_median_of_several_round_trips(client: httpx.AsyncClient) -> None:
    """One slow answer among them does not make a way slow."""
    delays = iter([0.0] * 3 + [0.0, 1.0] + [0.0] * 50)

    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(next(delays))
        await exchange.send(whole_response(json.dumps({"version": "1", "models": []}).encode()))

    server: ScriptedServer
    async with serve(script) as server:
        (only,) = await probe(client, ssh_node(server.url, ssh=None))
    assert only.latency_ms is not None
    assert only.latency_ms < 900.0


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://127.0.0.1:80", False),
        ("http://10.0.0.7:80", False),
        ("http://192.168.1.5:80", False),
        ("http://[::1]:80", False),
        ("http://209.170.80.132:80", True),
        ("http://[2606:4700::1111]:80", True),
    ],
)
async def test_public_addresses(url: str, public: bool) -> None:
    assert await routes._is_public(url) is public
