"""A server that says that its answers have ten times as many tokens as they have does not seem ten times as fast."""

from __future__ import annotations

import json

import pytest

from tests.mesh.meshes import MODEL, make_call, mesh_of_nodes, node, ollama_script, send, text_of
from tests.mesh.servers import Exchange, Script, serve

TOKENS, EVAL_MS = 60, 60.0
WORD = " wör"  # 5 bytes


def line(text: str, **more: object) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"model": MODEL, "message": message, "done": False, **more}).encode() + b"\n"


def script(*, counted: int | None, stream: bool) -> Script:
    duration_ns = int(EVAL_MS * 1e6)
    figures: dict[str, object] = {"done": True, "eval_duration": duration_ns, "total_duration": duration_ns}
    if counted is not None:
        figures["eval_count"] = counted
    if stream:
        body = b"".join(line(WORD) for _ in range(TOKENS)) + line("", **figures)
    else:
        body = line(WORD * TOKENS, **figures)

    async def answer(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: {len(body)}\r\n\r\n"
        await exchange.send(head.encode() + body)

    return ollama_script(answer)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("counted", [TOKENS, 10 * TOKENS, TOKENS // 10, 0, None])
async def test_the_rate_is_that_of_the_text_that_came(counted: int | None, stream: bool) -> None:
    async with (
        serve(script(counted=counted, stream=stream)) as server,
        mesh_of_nodes(node("a", server.url)) as mesh,
    ):
        answer = await send(mesh.mesh, make_call(stream=stream))
        assert text_of(b"".join([data async for data in answer])) == WORD * TOKENS
        rates = mesh.mesh.fleet["a"].rates
        assert rates.is_measured(MODEL)
        assert rates.decode_s(MODEL, 1.0) == pytest.approx(EVAL_MS / 1000.0 / TOKENS, rel=0.4)
