"""X-GPUMesh-Explain and X-GPUMesh-Why on a real gateway over simulated servers."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import httpx
import pytest

from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.proxy import read_explain
from gpumesh.lab.profile import LLAMA_8B, QWEN_7B, Faults, HostProfile
from gpumesh.topology import BackendKind, GatewaySpec, PolicyKind
from tests.gateway.fleet import CHAT, MODEL, RunningGateway, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

EXPLAIN = {"X-GPUMesh-Explain": "1"}
CHOSEN = re.compile(r"(\w+) [\d,.]+ s = [\d.]+ way \+ [\d.]+ wait \+ .*[\d.]+ read( [\d,]+ of [\d,]+)? \+ [\d.]+ write")


def with_loaded(name: str, loaded: str, **changes: object) -> HostProfile:
    """A host that has both models, but room for one, which is ``loaded``."""
    models = tuple(replace(model, resident=model.name == loaded) for model in (QWEN_7B, LLAMA_8B))
    return quick_host(name, models=models, max_loaded=1, **changes)


async def why(fleet: RunningGateway, prompt: str = "hello") -> tuple[httpx.Response, str]:
    """The answer to a request that asks why, and the reason."""
    answer = await fleet.chat(prompt, headers=EXPLAIN)
    assert answer.status_code == 200, answer.text
    return answer, answer.headers["X-GPUMesh-Why"]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_answer_says_why_if_it_is_asked(fleet: RunningGateway, path: str, stream: bool) -> None:
    body = {**CHAT, "stream": stream}
    answer = await fleet.client.post(path, json=body, headers=EXPLAIN)
    match = CHOSEN.match(answer.headers["X-GPUMesh-Why"])
    assert match is not None, answer.headers["X-GPUMesh-Why"]
    assert match[1] == answer.headers["X-GPUMesh-Node"]
    for headers in ({}, {"X-GPUMesh-Explain": "0"}):
        assert "X-GPUMesh-Why" not in (await fleet.client.post(path, json=body, headers=headers)).headers


async def test_the_prompt_is_counted(fleet: RunningGateway) -> None:
    _, reason = await why(fleet, "word " * 4000)
    match = re.search(r"read ([\d,]+) of ([\d,]+)", reason)
    assert match is not None, reason
    assert [int(count.replace(",", "")) for count in match.groups()] == pytest.approx([5000, 5000], rel=0.1)


async def test_the_load_on_the_other_node_is_the_reason() -> None:
    async with serve_hosts(with_loaded("hot", QWEN_7B.name), with_loaded("cold", LLAMA_8B.name)) as fleet:
        answer, reason = await why(fleet)
        assert answer.headers["X-GPUMesh-Node"] == "hot"
        assert "load" not in reason.partition(";")[0]
        assert re.search(r"; cold [\d.]+ s = (.* )?load qwen2\.5:7b, pushes out llama3\.1:8b", reason), reason


async def test_a_load_on_the_chosen_node_is_told() -> None:
    async with serve_hosts(with_loaded("cold", LLAMA_8B.name)) as fleet:
        _, reason = await why(fleet)
        assert re.match(r"cold .* [\d.]+ load qwen2\.5:7b, pushes out llama3\.1:8b \+ [\d.]+ read", reason), reason


async def test_a_request_that_has_waited_says_so() -> None:
    slow = with_loaded("one", QWEN_7B.name, tokens_per_s=100.0, answer_tokens=(40, 40))
    async with serve_hosts(slow, max_parallel=1) as fleet:
        first = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "the slot is taken")
        answer, reason = await why(fleet)
        assert (await first).status_code == 200
        assert float(answer.headers["X-GPUMesh-Queue-Ms"]) > 5
        assert re.match(r"one .* write.*; waited [\d.]+ s in the queue before$", reason), reason


async def test_after_a_failover_the_line_is_that_of_the_last_node() -> None:
    async with serve_hosts(with_loaded("a", QWEN_7B.name), with_loaded("b", QWEN_7B.name)) as fleet:
        await fleet.hosts["a"].set_faults(Faults(status=503, paths=("/api/chat",)))
        reasons = [await why(fleet) for _ in range(3)]
        moved = [reason for answer, reason in reasons if answer.headers["X-GPUMesh-Attempts"] == "2"]
        assert moved, "the first node is a in turn"
        assert all(reason.startswith("b ") and "after 1 failed attempt" in reason for reason in moved)


async def test_an_error_of_every_node_says_why_too() -> None:
    async with serve_hosts(with_loaded("a", QWEN_7B.name)) as fleet:
        await fleet.hosts["a"].set_faults(Faults(status=501, paths=("/api/chat",)))
        answer = await fleet.chat(headers=EXPLAIN)
        assert answer.status_code == 501
        assert answer.headers["X-GPUMesh-Why"].startswith("a ")


async def test_a_request_without_a_slot_has_no_forecast(fleet: RunningGateway) -> None:
    answer = await fleet.client.post("/api/show", json={"model": MODEL}, headers=EXPLAIN)
    assert "needs no slot" in answer.headers["X-GPUMesh-Why"]


async def test_another_policy_does_not_look_at_the_forecast() -> None:
    spec = GatewaySpec(policy=PolicyKind.ROUND_ROBIN)
    async with serve_hosts(with_loaded("a", QWEN_7B.name), spec=spec) as fleet:
        _, reason = await why(fleet)
        assert reason.endswith("; chosen by round-robin, which does not look at it")


async def test_a_name_of_a_host_cannot_break_the_header() -> None:
    strange = replace(QWEN_7B, name="größe; x-evil: 1:7b", resident=True)
    other = replace(LLAMA_8B, resident=False)
    async with serve_hosts(quick_host("a", models=(other, strange), max_loaded=1)) as fleet:
        answer = await fleet.chat(model=other.name, headers=EXPLAIN)
        assert answer.status_code == 200
        assert "pushes out gr??e; x-evil: 1:7b" in answer.headers["X-GPUMesh-Why"]


async def test_servers_of_other_kinds_are_explained_too() -> None:
    async with serve_hosts(with_loaded("a", QWEN_7B.name), kind=BackendKind.OPENAI) as fleet:
        answer = await fleet.client.post("/v1/chat/completions", json=CHAT, headers=EXPLAIN)
        assert CHOSEN.match(answer.headers["X-GPUMesh-Why"])


async def test_an_unknown_value_is_refused(fleet: RunningGateway) -> None:
    answer = await fleet.chat(headers={"X-GPUMesh-Explain": "perhaps"})
    assert answer.status_code == 400
    assert "X-GPUMesh-Explain" in answer.text
    with pytest.raises(BadRequest):
        read_explain({"x-gpumesh-explain": ""})
