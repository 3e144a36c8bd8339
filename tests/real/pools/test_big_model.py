"""A model that fits no host alone is planned, started and used; what llama-server reports is what was planned."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.prerequisites import needs
from tests.real.pools.pool_hosts import HEAD_PROGRAM
from tests.real.pools.pool_mesh import HEAD, ONE_POOL, POOL, WORKER, PoolMesh, pool_entry, pool_mesh

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
    needs("sshd", "llama-server", "openai"),
]

MODEL = "big"
LIMIT_MIB = 190  # of each host; the model has 226 MiB
DEVIATION = 0.05
LAYERS = 9  # eight blocks, and the output
# Such as "sched_reserve: RPC0[127.0.0.1:51071] compute buffer size =    28.51 MiB".
_BUFFER = re.compile(r": +(\S+) +(model|KV|compute) buffer size = +([0-9.]+) MiB")
_KINDS = {"model": "weights", "KV": "kv", "compute": "compute"}
QUESTION: list[Any] = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, big_model: Path) -> AsyncIterator[PoolMesh]:
    members = [{"node": name, "memory": f"{LIMIT_MIB}MiB"} for name in (HEAD, WORKER)]
    entry = pool_entry(big_model, nodes=members, context=512, parallel=2, split=None)
    async with pool_mesh(tmp_path_factory.mktemp("mesh"), [entry]) as made:
        yield made


async def test_no_host_has_the_memory_alone(mesh: PoolMesh, big_model: Path) -> None:
    for host in (HEAD, WORKER):
        shown = await mesh.gpumesh("pool", "plan", str(big_model), "--nodes", host, "--json", code=None)
        assert shown.code != 0, shown
        assert shown.json()["problems"], shown


async def test_the_plan_divides_the_layers(mesh: PoolMesh) -> None:
    plan = (await mesh.gpumesh("pool", "plan", POOL, "--json")).json()
    assert plan["problems"] == []
    layers = {member["node"]: sum(share["layers"] for share in member["shares"]) for member in plan["members"]}
    assert layers.keys() == {HEAD, WORKER}
    assert sum(layers.values()) == LAYERS
    assert min(layers.values()) >= 2
    for member in plan["members"]:
        needed = sum(share[f"{part}_bytes"] for share in member["shares"] for part in ("weights", "kv", "compute"))
        assert needed <= LIMIT_MIB * 2**20
    assert not mesh.programs(), "a plan starts nothing"


async def test_it_is_started_and_answers_and_ends(mesh: PoolMesh) -> None:
    plan = (await mesh.gpumesh("pool", "plan", POOL, "--json")).json()
    log = mesh.head.log_server()
    shown = await mesh.gpumesh("pool", "up", POOL)
    state = await mesh.shown_state()
    assert state["phase"] == "ready", shown
    assert mesh.programs() == ONE_POOL
    check_sizes(plan, state, log.read_text())
    await check_answers(mesh)
    check_listening_sockets(mesh)
    await check_commands(mesh)
    await mesh.gpumesh("pool", "down", POOL)
    assert not mesh.programs(), "`pool down` returns when all has ended"
    assert (await mesh.shown_state())["phase"] == "stopped"


def check_sizes(plan: dict[str, Any], state: dict[str, Any], log: str) -> None:
    """What llama-server reports is within 5 % of the plan: of each member all together, as `pool status` shows it, and
    each kind of buffer, as the log has it."""
    assert {member["node"] for member in state["members"]} == {HEAD, WORKER}
    for member in state["members"]:
        planned, measured = member["planned_bytes"], member["measured_bytes"]
        assert measured == pytest.approx(planned, rel=DEVIATION), state
    planned_sizes = {
        (member["node"], kind): sum(share[f"{kind}_bytes"] for share in member["shares"])
        for member in plan["members"]
        for kind in _KINDS.values()
    }
    measured_sizes = dict.fromkeys(planned_sizes, 0.0)
    for device, kind, mib in _BUFFER.findall(log):
        measured_sizes[WORKER if device.startswith("RPC") else HEAD, _KINDS[kind]] += float(mib) * 2**20
    assert measured_sizes == pytest.approx(planned_sizes, rel=DEVIATION)


async def check_answers(mesh: PoolMesh) -> None:
    """The `openai` client gets answers through the gateway, whole and as a stream, two at once."""
    async with mesh.client() as client:
        assert MODEL in {model.id async for model in client.models.list()}
        whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8)
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
        streams = [
            await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, stream=True)
            for _ in range(2)
        ]
        for stream in streams:
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def check_listening_sockets(mesh: PoolMesh) -> None:
    """Nothing of the pool listens beyond loopback: neither llama.cpp's programs nor sshd's forwarded ports."""
    sockets = [socket for host in mesh.hosts for socket in host.listening()]
    assert {socket.program for socket in sockets} >= {HEAD_PROGRAM, "ggml-rpc-server"}
    assert any(socket.program.startswith("sshd") for socket in sockets), "the way from the head to the worker"
    assert [socket for socket in sockets if not socket.is_loopback] == []


async def check_commands(mesh: PoolMesh) -> None:
    """The pool is a node of the mesh, and its model a model like any other."""
    status = (await mesh.gpumesh("status", "--json", code=None)).json()
    (node,) = [node for node in status["nodes"] if node["name"] == POOL]
    assert node["health"] == "healthy", node
    assert MODEL in (await mesh.gpumesh("models", "--json")).out
    refused = await mesh.gpumesh("ssh", POOL, "true", code=2)
    assert HEAD in refused.err, "its hosts are named"
    said = await mesh.gpumesh("run", MODEL, "hello", "-o", "num_predict=4", "--json")
    assert said.json()["node"] == POOL, said
