"""Requests in flight: what the page is told of them, and how their clients learn that they were cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gpumesh.balancer.outcomes import Outcome
from gpumesh.gateway.page.web_page import CANCEL_REASON
from gpumesh.topology import GatewaySpec, KeySpec
from tests.gateway.fleet import MODEL, RunningGateway, events, lines, metric, quick_host, serve_hosts

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = {"Authorization": "Bearer sesame"}
LIMITED = {"Authorization": "Bearer small"}
PROMPT = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow() -> AsyncIterator[RunningGateway]:
    """One host that writes for half a minute, and takes one request at a time."""
    host = quick_host("a", tokens_per_s=40.0, answer_tokens=(1200, 1200), pull_s=30.0)
    keys = (KeySpec("limited", env="LIMITED_TEST_KEY", models=(MODEL,)),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGE_TEST_KEY", "sesame")
        patch.setenv("LIMITED_TEST_KEY", "small")
        spec = GatewaySpec(api_key_env="PAGE_TEST_KEY", keys=keys)
        async with serve_hosts(host, max_parallel=1, spec=spec, drain_s=0.1) as fleet:
            yield fleet


async def list_requests(fleet: RunningGateway, headers: dict[str, str] = KEY) -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = (await fleet.client.get("/mesh/requests", headers=headers)).json()["requests"]
    return requests


async def wait_for(fleet: RunningGateway, phase: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            for request in await list_requests(fleet):
                if request["phase"] == phase and (phase != "writing" or request["tokens"]):
                    return request
            await asyncio.sleep(0.02)


async def cancel(fleet: RunningGateway, number: int, headers: dict[str, str] = KEY) -> httpx.Response:
    return await fleet.client.post(f"/mesh/requests/{number}/cancel", headers=headers)


def post(fleet: RunningGateway, path: str, headers: dict[str, str] = KEY, **body: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(fleet.client.post(path, json=body, headers=headers))


async def test_a_stream_is_shown_and_its_cancel_is_its_last_line(slow: RunningGateway) -> None:
    who = {"X-GPUMesh-Client": "alice", "X-Request-Id": "r-1", "X-GPUMesh-Priority": "interactive"}
    asked = post(slow, "/api/chat", {**KEY, **who}, model=MODEL, messages=PROMPT)
    seen = await wait_for(slow, "writing")
    names = ("client", "key", "id", "path", "model", "node", "priority", "attempts")
    assert [seen[name] for name in names] == [
        "alice",
        "PAGE_TEST_KEY",
        "r-1",
        "/api/chat",
        MODEL,
        "a",
        "interactive",
        1,
    ]
    assert seen["tokens"] > 0
    assert seen["ttft_ms"] > 0
    assert seen["forecast_s"] > 0
    assert (await cancel(slow, seen["number"])).json() == {"request": seen["number"], "done": "cancel"}
    answer = lines((await asked).text)
    assert answer[-1] == {"error": CANCEL_REASON}
    assert (await list_requests(slow)) == []
    text = (await slow.client.get("/metrics", headers=KEY)).text
    assert metric(text, "gpumesh_requests_total", route="/api/chat", outcome="cancelled") == 1
    assert slow.mesh.attempt_outcomes["a"] == {Outcome.CLIENT_GONE: 1}, "no fault of the node"
    assert slow.count_running() == 0
    assert (await cancel(slow, seen["number"])).status_code == 404


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/chat/completions", lambda event: event["error"]["message"]),
        ("/v1/messages", lambda event: event["error"]["message"]),
    ],
)
async def test_streams_of_other_dialects_end_with_their_error(slow: RunningGateway, path: str, error: Any) -> None:
    asked = post(slow, path, model=MODEL, messages=PROMPT, stream=True, max_tokens=1000)
    await cancel(slow, (await wait_for(slow, "writing"))["number"])
    told = [event for event in events((await asked).text) if event != "[DONE]"]
    assert error(told[-1]) == CANCEL_REASON


async def test_what_waits_and_what_is_read_gets_a_status_after_which_no_client_tries_again(
    slow: RunningGateway,
) -> None:
    reading = post(slow, "/v1/chat/completions", model=MODEL, messages=PROMPT)
    number = (await wait_for(slow, "reading"))["number"]
    waiting = post(slow, "/api/chat", LIMITED, model=MODEL, messages=PROMPT, stream=False)
    waits = await wait_for(slow, "waiting")
    assert (waits["node"], waits["forecast_s"], waits["key"]) == (None, None, "limited")
    assert [request["key"] for request in await list_requests(slow, LIMITED)] == ["limited"], "its own only"
    assert (await cancel(slow, waits["number"], LIMITED)).status_code == 403
    for asked, shown in ((waiting, waits["number"]), (reading, number)):
        await cancel(slow, shown)
        answer = await asked
        assert answer.status_code == 499
        assert CANCEL_REASON in json.dumps(answer.json()["error"])


async def test_a_pull_is_shown_and_can_be_stopped(slow: RunningGateway) -> None:
    asked = post(slow, "/api/pull", model="llama3.1:8b")
    seen = await wait_for(slow, "working")
    assert (seen["path"], seen["model"]) == ("/api/pull", None)
    await asyncio.sleep(0.2)  # until some progress has been sent
    await cancel(slow, seen["number"])
    assert lines((await asked).text)[-1] == {"error": CANCEL_REASON}


async def test_only_known_numbers_and_only_cancel(slow: RunningGateway) -> None:
    for path in ("1e3/cancel", "x/cancel", "1/pause", "99999999999999999999/cancel", "0/cancel"):
        assert (await slow.client.post(f"/mesh/requests/{path}", headers=KEY)).status_code == 404, path
    assert (await slow.client.get("/mesh/requests/1/cancel", headers=KEY)).status_code == 405


async def test_without_a_key_nothing_is_cancelled() -> None:
    async with serve_hosts(quick_host("a", tokens_per_s=40.0, answer_tokens=(1200, 1200)), drain_s=0.1) as fleet:
        asked = asyncio.create_task(fleet.client.post("/api/chat", json={"model": MODEL, "messages": PROMPT}))
        seen = await wait_for(fleet, "writing")
        assert seen["client"] == "127.0.0.1"
        assert (await cancel(fleet, seen["number"])).status_code == 403
        assert len(await list_requests(fleet)) == 1
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
