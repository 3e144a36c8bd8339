"""What a server sends before its first token, and between tokens, over real sockets: a comment is no token."""

from __future__ import annotations

import asyncio

import pytest

from gpumesh.backends.continuation.prefill import ContinuationStrategy
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import StreamCut
from gpumesh.mesh.requests import silence_watch
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind
from tests.mesh.meshes import make_call, mesh_of_nodes, node, openai_script, send, text_of
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve

PATH = "/v1/chat/completions"
HEAD = chunked_head("text/event-stream")
COMMENT = chunk(b":\n\n")
ROLE = chunk(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}\n\n')
END = chunk(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n') + LAST_CHUNK
OPENAI = BackendKind.OPENAI


def token(text: str, index: int = 0) -> bytes:
    choice = b'{"index":%d,"delta":{"content":"%s"},"finish_reason":null}' % (index, text.encode())
    return chunk(b'data: {"choices":[' + choice + b"]}\n\n")


async def answer_at_once(exchange: Exchange) -> None:
    await exchange.send(HEAD + ROLE + token(" b") + END)


@pytest.mark.parametrize("end", ["close", "reset", "error"])
async def test_until_the_first_token_another_node_can_answer(end: str) -> None:
    async def only_begins(exchange: Exchange) -> None:
        await exchange.send(HEAD + COMMENT + ROLE + COMMENT)
        if end == "error":
            await exchange.send(chunk(b'data: {"error":{"message":"out of memory","code":500}}\n\n') + LAST_CHUNK)
        elif end == "reset":
            exchange.reset()
        else:
            exchange.close()

    async with serve(openai_script(only_begins)) as first, serve(openai_script(answer_at_once)) as second:
        specs = (node("a", first.url, weight=100.0, kind=OPENAI), node("b", second.url, kind=OPENAI))
        async with mesh_of_nodes(*specs) as mesh:
            answer = await send(mesh.mesh, make_call(PATH, tools=[{"type": "function"}]))  # it could not be continued
            assert text_of(await answer.read()) == " b"
            assert (answer.node, answer.attempts, answer.continuations) == ("b", 2, 0)


async def test_a_server_that_sends_comments_while_it_reads_the_prompt_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """llama-server sends one each 30 s."""
    monkeypatch.setattr(silence_watch, "DEFAULT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.1)
    has_read_prompt = False

    async def reads_long(exchange: Exchange) -> None:
        nonlocal has_read_prompt
        await exchange.send(HEAD)
        for _ in range(6):
            await exchange.send(COMMENT)
            await asyncio.sleep(0.05)
        has_read_prompt = True
        await exchange.send(ROLE + token(" a") + END)

    async with serve(openai_script(reads_long)) as first, serve(openai_script(answer_at_once)) as second:
        specs = (node("a", first.url, weight=100.0, kind=OPENAI), node("b", second.url, kind=OPENAI))
        async with mesh_of_nodes(*specs) as mesh:
            answer = await send(mesh.mesh, make_call(PATH))
            assert has_read_prompt, "a comment does not begin the answer: its time to the first token would be wrong"
            assert text_of(await answer.read()) == " a"
            assert (answer.node, answer.attempts) == ("a", 1)


@pytest.mark.parametrize("sign", [COMMENT, chunk(b": ping\n\n")], ids=["empty", "named"])
async def test_comments_between_tokens_end_no_silence(sign: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "DEFAULT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.2)

    async def hangs(exchange: Exchange) -> None:
        await exchange.send(HEAD + ROLE + token("a"))
        while True:
            await exchange.send(sign)
            await asyncio.sleep(0.02)

    async with serve(openai_script(hangs)) as first, serve(openai_script(answer_at_once)) as second:
        specs = (node("a", first.url, weight=100.0, kind=OPENAI), node("b", second.url, kind=OPENAI))
        async with mesh_of_nodes(*specs) as mesh:
            mesh.mesh._send_context.strategies["b", "m"] = ContinuationStrategy.ASSISTANT_LAST
            answer = await send(mesh.mesh, make_call(PATH))
            assert text_of(await answer.read()) == "a b"
            assert (answer.node, answer.continuations) == ("b", 1)
            assert mesh.attempts("a") == {Outcome.TIMED_OUT: 1}


@pytest.mark.parametrize("reads", [True, False])
async def test_a_pause_is_no_silence_while_the_server_reads_another_prompt(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", 0.2)
    is_read = asyncio.Event()

    async def stalls(exchange: Exchange) -> None:
        """While it reads a long prompt, its other answer pauses. Without one, it pauses for ever."""
        await exchange.send(HEAD)
        if b"long prompt" in exchange.body:
            await asyncio.sleep(0.6)
            is_read.set()
        else:
            await exchange.send(ROLE + token("a"))
            await is_read.wait()
        await exchange.send(token(" a") + END)

    async with serve(openai_script(stalls)) as first, serve(openai_script(answer_at_once)) as second:
        specs = (node("a", first.url, weight=100.0, kind=OPENAI, max_parallel=2), node("b", second.url, kind=OPENAI))
        async with mesh_of_nodes(*specs) as mesh:
            mesh.mesh._send_context.strategies["b", "m"] = ContinuationStrategy.ASSISTANT_LAST
            mesh.mesh._send_context.pauses.learn("a", "m:latest", 0.002)
            answer = await send(mesh.mesh, make_call(PATH), node=None)
            assert answer.node == "a"
            reading: asyncio.Task[Answer] | None = None
            if reads:
                call = make_call(PATH, messages=[{"role": "user", "content": "a long prompt"}])
                reading = asyncio.create_task(send(mesh.mesh, call, node="a"))
            assert text_of(await answer.read()) == ("a a" if reads else "a b")
            assert answer.continuations == (0 if reads else 1)
            if reading is not None:
                await (await reading).read()


async def test_half_of_two_choices_is_an_error() -> None:
    async def ends_early(exchange: Exchange) -> None:
        await exchange.send(HEAD + token("a", 0) + token("b", 1) + END)

    async with (
        serve(openai_script(ends_early)) as server,
        mesh_of_nodes(node("a", server.url, kind=OPENAI)) as mesh,
    ):
        answer = await send(mesh.mesh, make_call(PATH, n=2))
        with pytest.raises(StreamCut, match="several answers at once"):
            await answer.read()
        assert mesh.mesh.request_counters.failed == 1
