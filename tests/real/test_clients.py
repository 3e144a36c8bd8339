"""The clients that people use, unmodified, against the gateway: only their base URL is another one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpumesh.cli.commands import env
from gpumesh.lab.profile import Faults
from gpumesh.topology import GatewaySpec, PolicyKind
from tests.gateway.fleet import MODEL, RunningGateway, serve_hosts

if (
    TYPE_CHECKING
):  # each test imports its own client: together they take five seconds, which every test process would pay
    import anthropic
    import ollama
    import openai

pytestmark = pytest.mark.real

EMBEDDER = "nomic-embed-text"
SAID = [{"role": "user", "content": "Why is the sky blue?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine that the tests run on."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    # In turn, so that both nodes are met.
    async with serve_hosts(spec=GatewaySpec(policy=PolicyKind.ROUND_ROBIN)) as made:
        yield made


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name
    """
    return f"rain in {city}"


# -- PyPI ollama -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def ollama_client(fleet: RunningGateway) -> AsyncIterator[ollama.AsyncClient]:
    import ollama

    async with ollama.AsyncClient(host=fleet.gateway.url) as client:
        yield client


async def test_ollama_talks(ollama_client: ollama.AsyncClient) -> None:
    whole = await ollama_client.chat(MODEL, messages=SAID)
    assert whole.message.content
    assert whole.done_reason == "stop"
    assert whole.eval_count
    pieces = [piece async for piece in await ollama_client.chat(MODEL, messages=SAID, stream=True)]
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    generated = await ollama_client.generate(MODEL, "Why?", options={"num_predict": 3})
    assert (generated.done_reason, generated.eval_count) == ("length", 3)
    streamed = [piece async for piece in await ollama_client.generate(MODEL, "Why?", stream=True)]
    assert streamed[-1].done


async def test_ollama_calls_tools_thinks_and_keeps_to_a_format(ollama_client: ollama.AsyncClient) -> None:
    called = await ollama_client.chat(MODEL, messages=SAID, tools=[weather])
    assert called.message.tool_calls is not None
    assert called.message.tool_calls[0].function.name == "weather"
    assert "city" in called.message.tool_calls[0].function.arguments
    made = await ollama_client.chat(MODEL, messages=SAID, format=SCHEMA)
    assert set(json.loads(made.message.content or "")) == {"city"}
    thought = await ollama_client.chat("qwen3:8b", messages=SAID, think=True)
    assert thought.message.thinking


async def test_ollama_embeds_and_lists(ollama_client: ollama.AsyncClient) -> None:
    assert len((await ollama_client.embed(EMBEDDER, ["one", "two"])).embeddings) == 2
    assert (await ollama_client.embeddings(EMBEDDER, "one")).embedding
    listed = {model.model for model in (await ollama_client.list()).models}
    assert listed == {MODEL, "nomic-embed-text:latest", "qwen3:8b", "llama3.1:8b"}
    assert (await ollama_client.show("llama3.1:8b")).details is not None
    assert [model.model for model in (await ollama_client.ps()).models] == ["nomic-embed-text:latest"]


async def test_ollama_changes_stores(fleet: RunningGateway, ollama_client: ollama.AsyncClient) -> None:
    import ollama

    steps = [step async for step in await ollama_client.pull("new:1b", stream=True)]
    assert steps[-1].status == "success"
    assert any(step.total and step.completed == step.total for step in steps)
    assert all("new:1b" in host.engine.store for host in fleet.hosts.values())
    assert (await ollama_client.pull("newer:1b")).status == "success"
    assert (await ollama_client.copy("new:1b", "mine:1b")).status == "success"
    assert (await ollama_client.chat("mine:1b", messages=SAID)).message.content
    assert (await ollama_client.create("brief:1b", from_="new:1b", system="Be brief.")).status == "success"
    assert (await ollama_client.delete("mine:1b")).status == "success"
    with pytest.raises(ollama.ResponseError) as gone:
        await ollama_client.delete("mine:1b")
    assert gone.value.status_code == 404


async def test_ollama_sends_a_model_file(
    fleet: RunningGateway, ollama_client: ollama.AsyncClient, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(1 << 20))
    digest = await ollama_client.create_blob(file)
    assert all(digest in host.blobs for host in fleet.hosts.values())


async def test_ollama_is_told_what_is_wrong(fleet: RunningGateway, ollama_client: ollama.AsyncClient) -> None:
    import ollama

    with pytest.raises(ollama.ResponseError, match="model 'nobody:1b' not found") as missing:
        await ollama_client.chat("nobody:1b", messages=SAID)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
        await ollama_client.chat(MODEL, messages=SAID, think=True)
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        await ollama_client.pull("missing:1b")
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=503))
    with pytest.raises(ollama.ResponseError) as busy:
        await ollama_client.chat(MODEL, messages=SAID)
    assert busy.value.status_code == 503


# -- PyPI openai -----------------------------------------------------------------------------------------------------

TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "It", "parameters": SCHEMA}}
ASKED: Any = SAID


@pytest.fixture
async def openai_client(fleet: RunningGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    import openai

    url = f"{fleet.gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def test_openai_talks(openai_client: openai.AsyncOpenAI) -> None:
    whole = await openai_client.chat.completions.create(model=MODEL, messages=ASKED)
    said = whole.choices[0].message.content
    assert said
    assert whole.usage is not None
    assert whole.choices[0].finish_reason == "stop"
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    pieces = [piece async for piece in stream]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said
    assert pieces[-1].usage == whole.usage
    completion = await openai_client.completions.create(model=MODEL, prompt="Why?", max_tokens=3)
    assert completion.choices[0].finish_reason == "length"
    response = await openai_client.responses.create(model=MODEL, input="Why?")
    assert response.output_text
    async with openai_client.responses.stream(model=MODEL, input="Why?") as events:
        final = await events.get_final_response()
    assert final.output_text == response.output_text


async def test_openai_calls_tools_and_keeps_to_a_format(openai_client: openai.AsyncOpenAI) -> None:
    called = await openai_client.chat.completions.create(model=MODEL, messages=ASKED, tools=[TOOL])
    assert called.choices[0].finish_reason == "tool_calls"
    assert called.choices[0].message.tool_calls is not None
    call = called.choices[0].message.tool_calls[0]
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"city"}
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    made = await openai_client.chat.completions.create(model=MODEL, messages=ASKED, response_format=form)
    assert set(json.loads(made.choices[0].message.content or "")) == {"city"}


async def test_openai_embeds_and_lists(openai_client: openai.AsyncOpenAI) -> None:
    made = await openai_client.embeddings.create(model=EMBEDDER, input=["one", "two"])
    assert [len(one.embedding) for one in made.data] == [768, 768]
    listed = {model.id async for model in openai_client.models.list()}
    assert {MODEL, "llama3.1:8b"} <= listed
    assert (await openai_client.models.retrieve("llama3.1:8b")).id == "llama3.1:8b"


async def test_openai_is_told_what_is_wrong(fleet: RunningGateway, openai_client: openai.AsyncOpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="nobody:1b"):
        await openai_client.chat.completions.create(model="nobody:1b", messages=ASKED)
    with pytest.raises(openai.NotFoundError):
        await openai_client.models.retrieve("nobody:1b")
    with pytest.raises(openai.BadRequestError):
        await openai_client.chat.completions.create(model=MODEL, messages=[])
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=429))
    with pytest.raises(openai.RateLimitError):
        await openai_client.chat.completions.create(model=MODEL, messages=ASKED)


# -- PyPI anthropic --------------------------------------------------------------------------------------------------


@pytest.fixture
async def anthropic_client(fleet: RunningGateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=fleet.gateway.url, api_key="none", max_retries=0) as client:
        yield client


async def test_anthropic_talks(anthropic_client: anthropic.AsyncAnthropic) -> None:
    whole = await anthropic_client.messages.create(model=MODEL, max_tokens=50, messages=ASKED)
    (block,) = whole.content
    assert block.type == "text"
    assert whole.stop_reason == "end_turn"
    assert whole.usage.output_tokens > 0
    async with anthropic_client.messages.stream(model=MODEL, max_tokens=50, messages=ASKED) as stream:
        said = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert said == block.text
    assert final.stop_reason == "end_turn"


async def test_anthropic_calls_tools(anthropic_client: anthropic.AsyncAnthropic) -> None:
    tool: Any = {"name": "weather", "description": "It", "input_schema": SCHEMA}
    called = await anthropic_client.messages.create(model=MODEL, max_tokens=50, messages=ASKED, tools=[tool])
    assert called.stop_reason == "tool_use"
    (block,) = called.content
    assert block.type == "tool_use"
    assert set(block.input) == {"city"}


async def test_anthropic_is_told_what_is_wrong(anthropic_client: anthropic.AsyncAnthropic) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="nobody:1b"):
        await anthropic_client.messages.create(model="nobody:1b", max_tokens=5, messages=ASKED)
    with pytest.raises(anthropic.BadRequestError):
        await anthropic_client.messages.create(model=MODEL, max_tokens=0, messages=ASKED)


# -- keys ------------------------------------------------------------------------------------------------------------


async def test_each_client_sends_its_key_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import anthropic
    import ollama
    import openai

    monkeypatch.setenv("GATEWAY_KEY", "k-12345")
    async with serve_hosts(spec=GatewaySpec(api_key_env="GATEWAY_KEY")) as fleet:
        url = fleet.gateway.url

        async def ask_all(key: str) -> AsyncIterator[type[Exception] | None]:
            async with ollama.AsyncClient(host=url, headers={"Authorization": f"Bearer {key}"}) as client:
                yield await failure(client.list())
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as other:
                yield await failure(other.chat.completions.create(model=MODEL, messages=ASKED))
            async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as third:
                yield await failure(third.messages.create(model=MODEL, max_tokens=5, messages=ASKED))

        assert [kind async for kind in ask_all("k-12345")] == [None] * 3
        assert [kind async for kind in ask_all("wrong")] == [
            ollama.ResponseError,
            openai.AuthenticationError,
            anthropic.AuthenticationError,
        ]


@pytest.mark.parametrize("needs_key", [False, True])
async def test_what_env_prints_is_enough_for_each_client(monkeypatch: pytest.MonkeyPatch, needs_key: bool) -> None:
    import anthropic
    import ollama
    import openai

    monkeypatch.setenv("GATEWAY_KEY", "it's k-12345")
    async with serve_hosts(spec=GatewaySpec(api_key_env="GATEWAY_KEY" if needs_key else None)) as fleet:
        lines = [env.export_lines(env.client_variables(fleet.gateway.url), env.ShellKind.SH)]
        if needs_key:
            lines.append(env.copy_lines("GATEWAY_KEY", env.ShellKind.SH))
        else:
            lines.append(env.export_lines(env.missing_keys(lambda _: False), env.ShellKind.SH))
        names = (*env.client_variables(""), *env.KEY_VARIABLES)
        script = "\n".join([*lines, *(f"printf '%s\\n' \"${name}\"" for name in names)])
        shown = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout
        for name, value in zip(names, shown.splitlines(), strict=True):
            monkeypatch.setenv(name, value)
        async with ollama.AsyncClient() as client, openai.AsyncOpenAI() as other, anthropic.AsyncAnthropic() as third:
            assert (await client.chat(MODEL, messages=SAID)).message.content
            assert (await other.chat.completions.create(model=MODEL, messages=ASKED)).choices[0].message.content
            assert (await third.messages.create(model=MODEL, max_tokens=5, messages=ASKED)).content


async def failure(asked: Any) -> type[Exception] | None:
    try:
        await asked
    except Exception as error:  # its kind is what is tested
        return type(error)
    return None


# -- in processes of their own ---------------------------------------------------------------------------------------


async def run(*command: str | Path, env: Mapping[str, str]) -> str:
    """What it prints; it must end well."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **env},
    )
    async with asyncio.timeout(50):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
