"""What a real llama-server counts as cached, beside what the balancer believes that it has."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpumesh.backends.base import ServerCounters
from gpumesh.backends.dialects import find_counters
from gpumesh.balancer.prefixes import PrefixIndex, PromptHasher
from gpumesh.balancer.prefixes.cache_size import HIT_SHARE, count_read_tokens
from gpumesh.gateway.body_parsers.json_members import read_small_members
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.gateway.prompt_reading import PromptReader
from tests.http_clients import loopback_client
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer

pytestmark = [pytest.mark.real, pytest.mark.slow, needs("llama-server")]

SLOTS, CONTEXT = 2, 4096
CHAT = "/v1/chat/completions"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    model = tiny_model.write_tiny_model(tmp_path / "tiny.gguf")
    async with (
        LlamaServer(model, slots=SLOTS, context=CONTEXT) as running,
        loopback_client(base_url=running.url, timeout=60.0) as client,
    ):
        yield client


async def ask(server: httpx.AsyncClient, path: str, body: bytes) -> tuple[dict[str, Any], ServerCounters]:
    response = await server.post(path, content=body, headers={"Content-Type": "application/json"})
    counters = find_counters(response.content)
    assert counters is not None, response.text
    return response.json(), counters


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 3}),
        ("/v1/completions", {"prompt": "word " * 100, "max_tokens": 3}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 3}),
        ("/v1/responses", {"input": "word " * 100, "max_output_tokens": 3}),
    ],
)
async def test_it_counts_the_tokens_that_its_cache_had(
    server: httpx.AsyncClient, path: str, prompt: dict[str, Any]
) -> None:
    body = json.dumps({"model": "tiny", **prompt}).encode()
    _, first = await ask(server, path, body)
    _, second = await ask(server, path, body)
    assert not first.cached_tokens
    assert first.prompt_tokens == second.prompt_tokens
    assert second.prompt_tokens is not None
    assert second.cached_tokens == second.prompt_tokens - 1  # it always reads the last token again


async def test_a_conversation_is_in_the_cache_as_far_as_the_balancer_believes(server: httpx.AsyncClient) -> None:
    reader, index, key = PromptReader(PromptHasher(b"secret of a test")), PrefixIndex(), ("tiny:latest", None)
    index.set_capacity("a", key, slots=SLOTS, context_tokens=CONTEXT)
    messages = [{"role": "system", "content": "".join(f"Rule {number}: be brief. " for number in range(60))}]
    for turn in range(4):
        messages.append({"role": "user", "content": f"Question {turn}: " + "why? " * 60})
        body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 20}).encode()
        members = read_small_members(body)
        assert members is not None
        prompt = reader.read_prompt(MODEL_ROUTES[CHAT], members, key)
        assert prompt is not None
        believed_bytes = index.match(key, prompt).get("a", 0)
        assert bool(believed_bytes) == (turn > 0)
        index.add("a", key, prompt, float(turn))
        document, counters = await ask(server, CHAT, body)
        read_tokens = count_read_tokens(counters, None)
        assert read_tokens is not None
        assert counters.prompt_tokens is not None
        cached_bytes = (1 - read_tokens / counters.prompt_tokens) * prompt.size
        assert HIT_SHARE * believed_bytes <= cached_bytes <= believed_bytes + 1000
        messages.append({"role": "assistant", "content": document["choices"][0]["message"]["content"]})
