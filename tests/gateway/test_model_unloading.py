"""``ollama stop`` and the unload button of a web page free the memory of every node, not of one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gpumesh.balancer.base import ResidencyKey
from gpumesh.gateway.body_parsers.json_members import read_small_members
from gpumesh.gateway.model_unloading import asks_to_unload
from gpumesh.lab.profile import EMBEDDER, Faults
from tests.gateway.fleet import MODEL, RunningGateway, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

STOP = {"model": MODEL, "prompt": "", "keep_alive": "0s"}  # ``ollama stop``
WEB_UI_UNLOAD = {"model": MODEL, "keep_alive": 0, "prompt": ""}  # Open WebUI
CHAT_UNLOAD = {"model": MODEL, "messages": [], "keep_alive": 0}


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    async with serve_hosts() as made:
        yield made


async def load_everywhere(fleet: RunningGateway, model: str = MODEL) -> None:
    for name in fleet.hosts:
        answer = await fleet.client.post("/api/generate", json={"model": model}, headers={"X-GPUMesh-Node": name})
        assert answer.json()["done_reason"] == "load"
    assert nodes_in_memory(fleet, model) == set(fleet.hosts)


def nodes_in_memory(fleet: RunningGateway, model: str = MODEL) -> set[str]:
    return {
        name
        for name, host in fleet.hosts.items()
        if model in {runner.model.name for runner in host.engine.list_runners()}
    }


@pytest.mark.parametrize(
    ("path", "body"), [("/api/generate", STOP), ("/api/generate", WEB_UI_UNLOAD), ("/api/chat", CHAT_UNLOAD)]
)
async def test_an_unload_is_for_the_whole_mesh(fleet: RunningGateway, path: str, body: dict[str, Any]) -> None:
    await load_everywhere(fleet)
    answer = await fleet.client.post(path, json=body)
    assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "a, b")
    document = answer.json()
    assert (document["model"], document["done"], document["done_reason"]) == (MODEL, True, "unload")
    assert (
        document["message"] == {"role": "assistant", "content": ""} if "messages" in body else not document["response"]
    )
    assert nodes_in_memory(fleet) == set()
    assert (await fleet.client.get("/api/ps")).json()["models"] == []
    for name in "ab":  # the balancer knows it at once, not when the next probe has come round
        assert not fleet.mesh.fleet[name].account.residency.is_resident(ResidencyKey(MODEL))


async def test_an_unload_of_one_node_is_for_that_node(fleet: RunningGateway) -> None:
    await load_everywhere(fleet)
    answer = await fleet.client.post("/api/generate", json=STOP, headers={"X-GPUMesh-Node": "b"})
    assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
    assert nodes_in_memory(fleet) == {"a"}


async def test_a_load_is_for_the_one_node_where_it_pays(fleet: RunningGateway) -> None:
    for _ in range(2):
        assert (await fleet.client.post("/api/generate", json={"model": MODEL})).json()["done_reason"] == "load"
        assert len(nodes_in_memory(fleet)) == 1


async def test_a_node_that_cannot_be_reached_with_the_model_in_memory_makes_it_an_error(fleet: RunningGateway) -> None:
    await load_everywhere(fleet)
    await fleet.mesh.refresh("ab")
    await fleet.hosts["b"].set_faults(Faults(refuse=True))
    await wait_until(lambda: "b" not in fleet.mesh.usable_nodes(), "b is known to be away")
    answer = await fleet.client.post("/api/generate", json=STOP)
    assert answer.status_code == 502
    assert answer.json()["error"] == "unloaded on a; not on b: it cannot be reached now"
    assert nodes_in_memory(fleet) == {"b"}


async def test_a_node_that_fails_to_unload_makes_it_an_error(fleet: RunningGateway) -> None:
    await load_everywhere(fleet)
    await fleet.hosts["b"].set_faults(Faults(status=500))
    answer = await fleet.client.post("/api/generate", json=STOP)
    assert answer.status_code == 502
    assert answer.json()["error"].startswith("unloaded on a; not on b: ")


async def test_a_model_that_no_node_has_is_404_and_one_in_no_memory_is_no_error(fleet: RunningGateway) -> None:
    assert (await fleet.client.post("/api/generate", json={**STOP, "model": "nothing:1b"})).status_code == 404
    assert (await fleet.client.post("/api/generate", json=STOP)).json()["done_reason"] == "unload"
    assert sum(host.engine.loads for host in fleet.hosts.values()) == 0


async def test_an_embedding_model_is_not_loaded_to_be_unloaded() -> None:
    async with serve_hosts(quick_host("a", models=(EMBEDDER,)), quick_host("b", models=(EMBEDDER,))) as fleet:
        await fleet.client.post("/api/embed", json={"model": EMBEDDER.name, "input": "x"})
        assert len(nodes_in_memory(fleet, EMBEDDER.name)) == 1
        answer = await fleet.client.post("/api/generate", json={**STOP, "model": EMBEDDER.name})
        assert answer.json()["done_reason"] == "unload"
        assert nodes_in_memory(fleet, EMBEDDER.name) == set()
        assert sum(host.engine.loads for host in fleet.hosts.values()) == 1


def members_ask_to_unload(path: str, **body: object) -> bool:
    members = read_small_members(json.dumps({"model": MODEL, **body}).encode())
    assert members is not None
    return asks_to_unload(path, members)


@pytest.mark.parametrize("zero", [0, 0.0, 1e-10, "0", "0s", "0m", "0h0m0s", "-0s", "0.0s", "00s"])
def test_no_time_as_ollama_reads_it(zero: object) -> None:
    assert members_ask_to_unload("/api/generate", keep_alive=zero)
    assert members_ask_to_unload("/api/chat", keep_alive=zero, messages=None)


@pytest.mark.parametrize("other", [None, 1, -1, "-1", "5m", "0.1s", "0x", "", True, False, [], {}, "0" * 100, 1e-3])
def test_other_times_are_no_unload(other: object) -> None:
    assert not members_ask_to_unload("/api/generate", keep_alive=other)


def test_a_prompt_is_answered_although_the_model_goes_afterwards() -> None:
    assert not members_ask_to_unload("/api/generate", keep_alive=0, prompt="x")
    assert not members_ask_to_unload("/api/generate", keep_alive=0, prompt=" ")
    assert not members_ask_to_unload("/api/generate", keep_alive=0, prompt="\n")
    assert not members_ask_to_unload("/api/chat", keep_alive=0, messages=[{"role": "user", "content": "x"}])
    assert not members_ask_to_unload("/api/embed", keep_alive=0, input="")
    assert members_ask_to_unload("/api/generate", keep_alive=0, messages=["not a member of this route"])


async def test_a_node_that_drains_is_unloaded_too(fleet: RunningGateway) -> None:
    await load_everywhere(fleet)
    fleet.mesh.drain("b")
    answer = await fleet.client.post("/api/generate", json=STOP)
    assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "a, b")
    assert nodes_in_memory(fleet) == set()
