"""A cut answer is continued to the very text of an uncut one, whatever the server does with a last message of the
assistant: a real llama-server whose model has a chat template of its own, alone and behind an Ollama."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gguf import GGUFWriter

from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.balancer.outcomes import Outcome
from gpumesh.topology import BackendKind
from tests.mesh.meshes import RunningMesh, count_final_frames, make_call, mesh_of_nodes, node, send, text_of
from tests.prerequisites import needs
from tests.real.hosts import LlamaServer
from tests.real.prefill_servers import NAME, Cut, CuttingProxy, TemplatedOllama

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240), needs("llama-server")]

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENS = 171
SEED = 1  # with it, no token comes 30 times in a row: such an answer would not be continued
CUTS = (1, 36, 168)
ROUTES: dict[str, dict[str, Any]] = {
    "/api/chat": {"options": {"num_predict": TOKENS, "temperature": 0}},
    "/api/generate": {"options": {"num_predict": TOKENS, "temperature": 0}},
    "/v1/chat/completions": {"max_tokens": TOKENS, "temperature": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    add_vocabulary = tiny_model._add_vocabulary

    def add_vocabulary_and_template(writer: GGUFWriter) -> None:
        add_vocabulary(writer)
        writer.add_chat_template(TEMPLATE)

    with pytest.MonkeyPatch.context() as patch:
        # Its tokenizer reads a blank as other tokens than the model writes: answers without any can be read back.
        patch.setattr(tiny_model, "ANSWERED", tiny_model.ANSWERED.replace(b" ", b""))
        patch.setattr(tiny_model, "_add_vocabulary", add_vocabulary_and_template)
        return tiny_model.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", seed=SEED)


@pytest.fixture
async def llama(model: Path) -> AsyncIterator[LlamaServer]:
    async with LlamaServer(model, alias=NAME) as server:
        yield server


async def check_cuts(mesh: RunningMesh, cut: Cut, call: HttpCall) -> None:
    """The text is that of an uncut answer, wherever it is cut."""
    want = text_of(await (await send(mesh.mesh, call)).read())
    assert len(want) == TOKENS
    for cut.after in CUTS:
        sent = cut.after
        answer = await send(mesh.mesh, call)
        data = await answer.read()
        assert text_of(data) == want, f"cut at {sent}"
        assert count_final_frames(data) == 1
        assert answer.continuations == 1, "it was really cut"
        assert b'"tokens_before":%d' % sent in data


async def test_this_server_repeats_the_message_without_a_mark(llama: LlamaServer) -> None:
    """The premise of this module. With the mark, it does not; and without streaming, it repeats in both cases."""
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "abc"}]
    marks = {"continue_final_message": True, "add_generation_prompt": False}
    async with CuttingProxy(llama.url, Cut()) as proxy, aiohttp.ClientSession() as http:
        texts: dict[tuple[bool, bool], str] = {}
        for marked in (False, True):
            for stream in (False, True):
                body = {"model": NAME, "messages": messages, "max_tokens": 2, "temperature": 0, "stream": stream}
                body |= marks if marked else {}
                async with http.post(f"{proxy.url}/v1/chat/completions", json=body) as reply:
                    data = await reply.read()
                    document = None if stream else await reply.json()
                texts[marked, stream] = (
                    text_of(data) if document is None else document["choices"][0]["message"]["content"]
                )
        assert {key for key, text in texts.items() if text.startswith("abc")} == {
            (False, False),
            (False, True),
            (True, False),
        }


@pytest.mark.parametrize("renders", [True, False], ids=["shows its prompt", "repeats, and shows no prompt"])
async def test_an_ollama_whose_models_template_llama_server_renders(llama: LlamaServer, renders: bool) -> None:
    cut = Cut()
    async with (
        TemplatedOllama(llama.url, cut, renders=renders) as one,
        TemplatedOllama(llama.url, cut, renders=renders) as other,
    ):
        for route, limits in ROUTES.items():
            async with mesh_of_nodes(node("a", one.url), node("b", other.url)) as mesh:
                await check_cuts(mesh, cut, make_call(route, **limits))
                strategies = set(mesh.mesh._send_context.strategies.values())
                assert strategies == (set() if renders else {ContinuationStrategy.ASSISTANT_REPEATED})
                assert (one.paths + other.paths).count("/completion") == (len(CUTS) if renders else 0)
            one.paths.clear()
            other.paths.clear()


@pytest.mark.parametrize("kind", [BackendKind.LLAMACPP, BackendKind.OPENAI])
async def test_a_llama_server_whose_model_has_a_template_of_its_own(llama: LlamaServer, kind: BackendKind) -> None:
    route, cut = "/v1/chat/completions", Cut()
    async with (
        CuttingProxy(llama.url, cut) as one,
        CuttingProxy(llama.url, cut) as other,
        mesh_of_nodes(node("a", one.url, kind=kind), node("b", other.url, kind=kind)) as mesh,
    ):
        await check_cuts(mesh, cut, make_call(route, **ROUTES[route]))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_two_choices_are_both_complete_before_the_answer_is(llama: LlamaServer, path: str) -> None:
    async with mesh_of_nodes(node("a", llama.url, kind=BackendKind.LLAMACPP)) as mesh:
        answer = await send(mesh.mesh, make_call(path, n=2, stream=True, max_tokens=5, prompt="Why?"))
        data = await answer.read()
        assert data.count(b'"finish_reason":"length"') == 2
        assert data.count(b"[DONE]") == 1
        assert mesh.attempts("a") == {Outcome.SERVED: 1}
