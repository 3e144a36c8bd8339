"""A server of the OpenAI API that gives neither durations nor counts: the mesh learns its rate from the stream."""

from __future__ import annotations

import asyncio
import json

from gpumesh.topology import BackendKind
from tests.mesh.meshes import MODEL, make_call, mesh_of_nodes, node, openai_script, send
from tests.mesh.servers import Exchange, serve

TOKENS, TOKEN_S = 60, 0.01


def event(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


class Pace:
    """Sends tokens, and measures how long each took: on a busy machine, longer than ``TOKEN_S``."""

    token_s = 0.0

    async def stream(self, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await exchange.send(event({"role": "assistant"}))
        began_at = loop.time()
        for _ in range(TOKENS):
            await asyncio.sleep(TOKEN_S)
            await exchange.send(event({"content": " x"}))
        self.token_s = (loop.time() - began_at) / TOKENS
        await exchange.send(event({}, "stop") + b"data: [DONE]\n\n")


async def test_the_rate_is_learned_from_the_frames() -> None:
    pace, expected_s = Pace(), []
    async with (
        serve(openai_script(pace.stream)) as server,
        mesh_of_nodes(node("vllm", server.url, kind=BackendKind.OPENAI)) as mesh,
    ):
        for _ in range(2):
            answer = await send(mesh.mesh, make_call("/v1/chat/completions", stream=True))
            async for _ in answer:
                pass
            expected_s.append(pace.token_s)
        rates = mesh.mesh.fleet["vllm"].rates
        assert rates.is_measured(MODEL)
        assert 0.8 * min(expected_s) < rates.decode_s(MODEL, 1.0) < 1.2 * max(expected_s)
