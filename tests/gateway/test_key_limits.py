"""What a key with limits gets beyond them, in the dialect of its client."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from gpumesh.topology import GatewaySpec, KeySpec, RequestRate
from tests.gateway.fleet import MODEL, RunningGateway, metric, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

BUDGET = 6000
CLIENTS = 32
HOST = quick_host("a", tokens_per_s=5000.0, answer_tokens=(100, 101))


def key(name: str, **limits: Any) -> KeySpec:
    """A key whose secret is its name."""
    return KeySpec(name, sha256=hashlib.sha256(name.encode()).hexdigest(), **limits)


KEYS = (
    key("once", rate=RequestRate(1, 86400.0)),
    key("poor", tokens_per_month=1),
    key("budget", tokens_per_month=BUDGET),
    key("free"),
)


@asynccontextmanager
async def serve_keyed() -> AsyncIterator[RunningGateway]:
    async with serve_hosts(HOST, max_parallel=CLIENTS, spec=GatewaySpec(keys=KEYS)) as (running):
        yield running


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
PATHS = ("/api/chat", "/v1/chat/completions", "/v1/messages")


def message_of(path: str, document: Any, error_type: str) -> str:
    """The message of an error in the dialect of this path, whose form is checked."""
    if path.startswith("/api/"):
        assert set(document) == {"error"}
        return str(document["error"])
    assert document["error"]["type"] == error_type
    if path == "/v1/messages":
        assert document["type"] == "error"
    return str(document["error"]["message"])


async def test_limits_are_told_in_each_dialect() -> None:
    async with serve_keyed() as running:
        post = running.client.post
        for path in PATHS:
            wrong = await post(path, json=CHAT, headers=bearer("wrong"))
            assert wrong.status_code == 401
            assert "an API key is needed" in message_of(path, wrong.json(), "authentication_error")
        assert (await post("/api/chat", json=CHAT, headers=bearer("once"))).status_code == 200
        assert (await post("/api/chat", json=CHAT, headers=bearer("poor"))).status_code == 200
        for path in PATHS:
            often = await post(path, json=CHAT, headers=bearer("once"))
            assert often.status_code == 429
            assert 86000 < int(often.headers["Retry-After"]) <= 86400
            assert message_of(path, often.json(), "rate_limit_error") == "the key once may ask 1 times in a day"
            spent = await post(path, json=CHAT, headers=bearer("poor"))
            assert spent.status_code == 429
            assert int(spent.headers["Retry-After"]) > 0
            assert spent.headers["X-Should-Retry"] == "false", "otherwise the clients of OpenAI try again at once"
            assert "the budget of the key poor is used up" in message_of(path, spent.json(), "rate_limit_error")
        for name in ("once", "poor"):  # lists are no requests to a model
            assert (await running.client.get("/api/tags", headers=bearer(name))).status_code == 200
        assert (await post("/api/chat", json=CHAT, headers=bearer("free"))).status_code == 200


async def test_a_budget_holds_within_one_request_under_many_clients() -> None:
    async with serve_keyed() as running:
        used: list[int] = []

        async def ask_until_refused() -> str:
            """Asks again and again, until the budget is used up. Returns the message then."""
            body = {**CHAT, "stream": False, "options": {"num_predict": 100}}
            while True:
                answer = await running.client.post("/api/chat", json=body, headers=bearer("budget"))
                document = answer.json()
                if answer.status_code == 200:
                    used.append(document["prompt_eval_count"] + document["eval_count"])
                    continue
                assert answer.status_code == 429
                if "X-Should-Retry" in answer.headers:
                    return str(document["error"])
                await asyncio.sleep(0.05)  # the rest is reserved: one of those in flight ends soon

        messages = await asyncio.gather(*(ask_until_refused() for _ in range(CLIENTS)))
        assert BUDGET <= sum(used) < BUDGET + max(used)
        assert set(messages) == {messages[0]}
        assert f"is used up: {sum(used)} of {BUDGET} tokens" in messages[0], "to the token, as the client sees it"
        text = (await running.client.get("/metrics", headers=bearer("free"))).text
        tokens = [metric(text, f"gpumesh_key_{name}_tokens_total", key="budget") for name in ("prompt", "output")]
        assert sum(tokens) == sum(used)
        assert tokens[1] == running.hosts["a"].counters.tokens
        assert metric(text, "gpumesh_key_requests_total", key="budget") == len(used)


async def test_a_client_that_leaves_pays_for_what_it_got() -> None:
    spec = GatewaySpec(keys=(key("budget", tokens_per_month=10_000),))
    async with serve_hosts(quick_host("a", tokens_per_s=500.0, answer_tokens=(400, 401)), spec=spec) as running:
        async with running.client.stream("POST", "/api/chat", json=CHAT, headers=bearer("budget")) as reply:
            frames = [line async for line in _first(20, reply.aiter_lines())]
        await wait_until(lambda: running.count_running() == 0, "the host has stopped")
        await wait_until(
            lambda: running.gateway.usage.read_tokens("budget", f"{datetime.now(UTC):%Y-%m}") > 0, "it is counted"
        )
        text = (await running.client.get("/metrics", headers=bearer("budget"))).text
        assert metric(text, "gpumesh_key_output_tokens_total", key="budget") >= len(frames)
        assert metric(text, "gpumesh_key_output_tokens_total", key="budget") < 400


async def _first(count: int, items: AsyncIterator[str]) -> AsyncIterator[str]:
    async for item in items:
        yield item
        count -= 1
        if not count:
            return
