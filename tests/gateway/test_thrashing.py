"""A node of the lab that loads again and again: what the status, the metrics and the audit say of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumesh.lab.profile import LLAMA_8B, QWEN_7B
from gpumesh.state import Finding
from tests.gateway.fleet import RunningGateway, metric, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

HOST = quick_host("one", models=(QWEN_7B, LLAMA_8B), max_loaded=1, load_s=0.3)
ROUNDS = 4


def thrashing(fleet: RunningGateway) -> list[Finding]:
    return [finding for finding in fleet.mesh.snapshot().findings if finding.code == "thrashing"]


async def send(fleet: RunningGateway, **body: Any) -> None:
    answer = await fleet.chat(**body)
    assert answer.status_code == 200, answer.text


async def test_two_models_that_push_each_other_out() -> None:
    async with serve_hosts(HOST) as fleet:
        await send(fleet, model=QWEN_7B.name)
        assert thrashing(fleet) == [], "one load is no fault"
        for _ in range(ROUNDS):
            await send(fleet, model=LLAMA_8B.name)
            await send(fleet, model=QWEN_7B.name)
        (finding,) = thrashing(fleet)
        assert finding.node == "one"
        assert "qwen2.5:7b and llama3.1:8b push each other out" in finding.message
        assert "`nodes` of each model" in (finding.hint or "")
        document = (await fleet.client.get("/mesh/status")).json()
        (node,) = document["nodes"]
        assert node["loading"]["loads"] == fleet.hosts["one"].counters.loads == 2 * ROUNDS + 1
        assert {model["name"] for model in node["loading"]["models"]} == {QWEN_7B.name, LLAMA_8B.name}
        assert document["findings"][0]["code"] == "thrashing"
        text = (await fleet.client.get("/metrics")).text
        assert metric(text, "gpumesh_model_loads_total", node="one") == 2 * ROUNDS + 1
        assert metric(text, "gpumesh_model_loads_total", model=QWEN_7B.name) == ROUNDS + 1
        assert metric(text, "gpumesh_models_pushed_out_total", model=QWEN_7B.name) == ROUNDS
        # Each load takes 0.3 s, and the server says so.
        assert metric(text, "gpumesh_model_load_seconds_total") == pytest.approx(0.3 * (2 * ROUNDS + 1), rel=0.5)
        assert metric(text, "gpumesh_finding", code="thrashing", node="one") == 1


async def test_two_contexts_of_one_model_that_take_turns() -> None:
    async with serve_hosts(HOST) as fleet:
        for _ in range(ROUNDS):
            for context in (4096, 8192):
                await send(fleet, options={"num_ctx": context})
        (finding,) = thrashing(fleet)
        assert "qwen2.5:7b is asked for with different `num_ctx` in turn (4,096 and 8,192)" in finding.message
        assert "context_steps: [8192] of this model" in (finding.hint or "")


async def test_what_was_learned_and_decided_is_in_the_status() -> None:
    host = replace(HOST, tokens_per_s=200.0, prefill_tokens_per_s=5000.0, answer_tokens=(40, 40))
    async with serve_hosts(host) as fleet:
        for _ in range(3):
            await send(fleet, prompt="word " * 2000)
        await wait_until(lambda: fleet.count_running() == 0, "all have ended")
        (node,) = (await fleet.client.get("/mesh/status")).json()["nodes"]
        (learned,) = node["learned"]
        assert learned["model"] == QWEN_7B.name
        assert learned["tokens_per_s"] == pytest.approx(200.0, rel=0.5)
        assert learned["prefill_tokens_per_s"] == pytest.approx(5000.0, rel=0.5)
        assert learned["load_s"] == pytest.approx(0.3, rel=0.5)
        latest = node["decisions"][0]
        assert len(node["decisions"]) == 3
        assert latest["model"] == QWEN_7B.name
        assert latest["actual_s"] == pytest.approx(0.2, abs=0.4)
        assert " way + " in latest["why"]
        text = (await fleet.client.get("/metrics")).text
        assert metric(text, "gpumesh_forecast_ratio_count", node="one") == 3
        assert metric(text, "gpumesh_forecast_actual_seconds_total") > 0.5
        # The second and the third prompt were believed to be in the server's cache.
        assert metric(text, "gpumesh_prompt_tokens_believed_cached_total") > 2000
