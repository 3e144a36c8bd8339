"""The clients that people use, unmodified, read streams that begin with signs of life, and the errors at their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Any

import pytest

from gpumesh.lab.profile import Faults
from gpumesh.topology import HEARTBEAT_S, GatewaySpec
from tests.gateway.fleet import MODEL, RunningGateway, quick_host, serve_hosts

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

MESSAGES: list[Any] = [{"role": "user", "content": "Why is the sky blue?"}]
SPEC = GatewaySpec(heartbeat_s=MappingProxyType(dict.fromkeys(HEARTBEAT_S, 0.1)))
PREFILL_TOKENS_PER_S = 20.0  # a second for the prompt
DEADLINE = {"X-GPUMesh-Timeout": "0.6"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine that the tests run on."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    """A node that reads prompts slowly."""
    slow = quick_host("a", prefill_tokens_per_s=PREFILL_TOKENS_PER_S, prefix_cache=False)
    async with serve_hosts(slow, spec=SPEC) as made:
        yield made


async def test_openai(fleet: RunningGateway) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{fleet.gateway.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert "x-gpumesh-node" not in stream.response.headers, "the head came before the node's answer"
        assert "".join([piece.choices[0].delta.content or "" async for piece in stream if piece.choices])
        completion = await client.completions.create(model=MODEL, prompt="Why is it?", stream=True)
        assert "".join([piece.choices[0].text async for piece in completion])
        async with client.responses.stream(model=MODEL, input="Why is it?") as events:
            assert (await events.get_final_response()).output_text
        await fleet.hosts["a"].set_faults(Faults(hang=True))
        with pytest.raises(openai.APIError, match="no answer within"):
            async for _ in await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, extra_headers=DEADLINE
            ):
                pass
        response = await client.responses.create(model=MODEL, input="?", stream=True, extra_headers=DEADLINE)
        assert [event.type async for event in response] == ["error"]


async def test_anthropic(fleet: RunningGateway) -> None:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=fleet.gateway.url, api_key="none", max_retries=0) as client:
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=MESSAGES) as stream:
            assert "x-gpumesh-node" not in stream.response.headers
            assert "".join([text async for text in stream.text_stream])
        await fleet.hosts["a"].set_faults(Faults(hang=True))
        with pytest.raises(anthropic.APIStatusError, match="no answer within"):
            async for _ in await client.messages.create(
                model=MODEL, max_tokens=50, messages=MESSAGES, stream=True, extra_headers=DEADLINE
            ):
                pass


async def test_ollama(fleet: RunningGateway) -> None:
    """Where mesh.yaml asks for a heartbeat on these routes."""
    import ollama

    raw = await fleet.client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES})
    assert raw.text.startswith("  "), "the answers below begin so"
    async with ollama.AsyncClient(host=fleet.gateway.url) as client:
        pieces = [piece async for piece in await client.chat(MODEL, messages=MESSAGES, stream=True)]
        assert pieces[-1].done
        assert [piece async for piece in await client.generate(MODEL, "Why is it?", stream=True)][-1].done
    async with ollama.AsyncClient(host=fleet.gateway.url, headers=DEADLINE) as client:
        await fleet.hosts["a"].set_faults(Faults(hang=True))
        with pytest.raises(ollama.ResponseError, match="no answer within"):
            async for _ in await client.chat(MODEL, messages=MESSAGES, stream=True):
                pass
