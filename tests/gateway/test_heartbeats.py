"""A stream that is silent for long gets a sign of life, and nothing else about the request changes by that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.topology import HEARTBEAT_S, BackendKind, GatewaySpec, ModelSpec
from tests.gateway.fleet import RunningGateway, events, lines, metric, node, serve_nodes
from tests.mesh.meshes import MODEL, ollama_script
from tests.mesh.servers import LAST_CHUNK, Exchange, ScriptedServer, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

Script = Callable[[Exchange], Awaitable[None]]
INTERVAL_S = 0.06
SILENCE_S = 0.25  # long enough for several signs of life
COMMENT = ": waiting\n\n"
SPEC = GatewaySpec(heartbeat_s=MappingProxyType(dict.fromkeys(HEARTBEAT_S, INTERVAL_S)))

MESSAGES = [{"role": "user", "content": "?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "?"},
    "/v1/responses": {"input": "?"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "?"},
}
EVENT_ROUTES = [path for path in BODIES if path.startswith("/v1/")]


def event(**document: Any) -> bytes:
    name = f"event: {document['type']}\n" if "type" in document else ""
    return f"{name}data: {json.dumps(document)}\n\n".encode()


def line(**document: Any) -> bytes:
    return json.dumps(document).encode() + b"\n"


DONE = b"data: [DONE]\n\n"
# Two tokens, and the end, of each route.
ANSWERS: dict[str, list[bytes]] = {
    "/v1/chat/completions": [
        event(id="1", choices=[{"index": 0, "delta": {"content": "Because"}, "finish_reason": None}]),
        event(id="1", choices=[{"index": 0, "delta": {"content": " so."}, "finish_reason": None}]),
        event(id="1", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]) + DONE,
    ],
    "/v1/completions": [
        event(id="1", choices=[{"index": 0, "text": "Because", "finish_reason": None}]),
        event(id="1", choices=[{"index": 0, "text": " so.", "finish_reason": None}]),
        event(id="1", choices=[{"index": 0, "text": "", "finish_reason": "stop"}]) + DONE,
    ],
    "/v1/responses": [
        event(type="response.output_text.delta", delta="Because"),
        event(type="response.output_text.delta", delta=" so."),
        event(type="response.completed", response={}),
    ],
    "/v1/messages": [
        event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "Because"}),
        event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": " so."}),
        event(type="message_stop"),
    ],
    "/api/chat": [
        line(message={"role": "assistant", "content": "Because"}, done=False),
        line(message={"role": "assistant", "content": " so."}, done=False),
        line(message={"role": "assistant", "content": ""}, done=True, done_reason="stop"),
    ],
    "/api/generate": [
        line(response="Because", done=False),
        line(response=" so.", done=False),
        line(response="", done=True, done_reason="stop"),
    ],
}


def route_of(exchange: Exchange) -> str:
    return exchange.head.split(b" ")[1].decode()


def stream_head(exchange: Exchange) -> bytes:
    return chunked_head("application/x-ndjson" if route_of(exchange).startswith("/api/") else "text/event-stream")


def answer_late(before_s: float = SILENCE_S, between_s: float = 0.0) -> Script:
    """A server that is silent before its first token, and before its second."""

    async def answer(exchange: Exchange) -> None:
        frames = ANSWERS[route_of(exchange)]
        await asyncio.sleep(before_s)
        await exchange.send(stream_head(exchange) + chunk(frames[0]))
        await asyncio.sleep(between_s)
        for frame in frames[1:]:
            await exchange.send(chunk(frame))
        await exchange.send(LAST_CHUNK)

    return answer


def reply_late(reply: bytes, before_s: float = SILENCE_S) -> Script:
    async def answer(exchange: Exchange) -> None:
        await asyncio.sleep(before_s)
        await exchange.send(reply)

    return answer


async def hang_up_late(exchange: Exchange) -> None:
    await asyncio.sleep(SILENCE_S)
    exchange.reset()


@dataclass
class Heard:
    """A gateway over scripted servers, and what it has written about its requests."""

    running: RunningGateway
    servers: list[ScriptedServer]
    access_log: AccessLog
    path: Path

    async def ask(self, path: str, **more: Any) -> httpx.Response:
        return await self.running.client.post(path, json={"model": MODEL, **BODIES[path], "stream": True, **more})

    def entries(self) -> list[dict[str, Any]]:
        """Of the access log."""
        self.access_log.flush()
        return [entry for entry in lines(self.path.read_text()) if entry["path"] in BODIES]

    async def last_entry(self) -> dict[str, Any]:
        """Of the access log, with which the metrics must agree."""
        entry = self.entries()[-1]
        labels = {"route": entry["path"], "outcome": entry["outcome"], "code": str(entry["status"])}
        assert metric((await self.running.client.get("/metrics")).text, "gpumesh_requests_total", **labels) >= 1
        return entry


@asynccontextmanager
async def serve_scripts(
    tmp_path: Path,
    *scripts: Script,
    spec: GatewaySpec = SPEC,
    models: tuple[ModelSpec, ...] = (),
    drain_s: float = 10.0,
    probes: bool = True,
) -> AsyncIterator[Heard]:
    """A gateway over an Ollama with MODEL for each script; the first is preferred. ``probes``: these are answered here,
    and not by the scripts."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serve(ollama_script(script) if probes else script)) for script in scripts
        ]
        nodes = tuple(
            replace(
                node(name, server.url, kind=BackendKind.OLLAMA, max_parallel=64),
                weight=0.001**place,
            )
            for place, (name, server) in enumerate(zip("abc", servers, strict=False))
        )
        access_log = AccessLog(tmp_path / "access.jsonl")
        running = await stack.enter_async_context(
            serve_nodes(nodes, spec=spec, access_log=access_log, models=models, drain_s=drain_s)
        )
        yield Heard(running, servers, access_log, tmp_path / "access.jsonl")


# -- the signs --------------------------------------------------------------------------------------------------------


async def test_a_client_of_events_gets_comments_until_the_first_token(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, answer_late()) as heard:
        for path in EVENT_ROUTES:
            response = await heard.ask(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            assert response.headers["x-accel-buffering"] == "no"
            comments = response.text.count(COMMENT)
            assert 2 <= comments <= SILENCE_S / INTERVAL_S
            assert response.text == COMMENT * comments + b"".join(ANSWERS[path]).decode(), "first comments, then tokens"
            entry = await heard.last_entry()
            assert (entry["outcome"], entry["status"], entry["attempts"]) == ("served", 200, 1)
            assert entry["ttft_ms"] >= SILENCE_S * 1000 * 0.9, "a comment is no token"


async def test_a_client_of_ollamas_api_gets_blanks_if_mesh_yaml_says_so(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, answer_late()) as heard:
        for path in ("/api/chat", "/api/generate"):
            response = await heard.ask(path)
            assert response.headers["content-type"] == "application/x-ndjson"
            blanks = len(response.text) - len(response.text.lstrip(" "))
            assert 2 <= blanks <= SILENCE_S / INTERVAL_S
            assert response.text == " " * blanks + b"".join(ANSWERS[path]).decode()
            assert all(text and json.loads(text) for text in response.text.split("\n")[:-1]), "no line is empty"
            without_stream = await heard.running.client.post(path, json={"model": MODEL, **BODIES[path]})
            assert without_stream.text.startswith("  "), "these routes stream unless the client says otherwise"


async def test_nothing_is_sent_that_nobody_asked_for(tmp_path: Path) -> None:
    """Before 10 s, on Ollama's routes, and without a stream."""
    off = {"/v1/completions": 0.0, "/v1/messages": INTERVAL_S}
    spec = GatewaySpec(heartbeat_s=MappingProxyType({**HEARTBEAT_S, **off}))
    async with serve_scripts(tmp_path, answer_late(), spec=spec) as heard:
        for path in ("/v1/chat/completions", "/v1/completions", "/api/chat"):
            response = await heard.ask(path)
            assert response.text == b"".join(ANSWERS[path]).decode()
            assert response.headers["x-gpumesh-node"] == "a"
        whole = await heard.ask("/v1/messages", stream=False)
        assert COMMENT not in whole.text


async def test_a_pause_between_two_tokens_gets_comments_too_but_only_between_whole_frames(tmp_path: Path) -> None:
    async def answer(exchange: Exchange) -> None:
        first, second, end = ANSWERS[route_of(exchange)]
        await exchange.send(stream_head(exchange) + chunk(first))
        await asyncio.sleep(SILENCE_S)
        await exchange.send(chunk(second[:20]))
        await asyncio.sleep(SILENCE_S)
        await exchange.send(chunk(second[20:]) + chunk(end) + LAST_CHUNK)

    async with serve_scripts(tmp_path, answer) as heard:
        for path in EVENT_ROUTES:
            response = await heard.ask(path)
            assert response.headers["x-gpumesh-node"] == "a", "the head went out with the first token"
            first, second, end = (frame.decode() for frame in ANSWERS[path])
            assert response.text.count(COMMENT) >= 4
            assert response.text.replace(COMMENT, "") == first + second + end
            assert second in response.text


async def test_tokens_that_come_steadily_need_no_comment(tmp_path: Path) -> None:
    async def answer(exchange: Exchange) -> None:
        first, _, end = ANSWERS[route_of(exchange)]
        await exchange.send(stream_head(exchange))
        for _ in range(40):
            await exchange.send(chunk(first))
            await asyncio.sleep(0.01)
        await exchange.send(chunk(end) + LAST_CHUNK)

    spec = replace(SPEC, heartbeat_s=MappingProxyType(dict.fromkeys(HEARTBEAT_S, 0.3)))
    async with serve_scripts(tmp_path, answer, spec=spec) as heard:
        assert COMMENT not in (await heard.ask("/v1/chat/completions")).text


async def test_comments_of_the_server_before_its_first_token_are_still_held(tmp_path: Path) -> None:
    async def answer(exchange: Exchange) -> None:
        first, second, end = ANSWERS[route_of(exchange)]
        await exchange.send(stream_head(exchange))
        for _ in range(5):
            await exchange.send(chunk(b":\n\n"))
            await asyncio.sleep(SILENCE_S / 5)
        await exchange.send(chunk(first) + chunk(b":\n\n") + chunk(second) + chunk(end) + LAST_CHUNK)

    async with serve_scripts(tmp_path, answer) as heard:
        response = await heard.ask("/v1/chat/completions")
        first, second, end = (frame.decode() for frame in ANSWERS["/v1/chat/completions"])
        assert response.text.replace(COMMENT, "") == first + ":\n\n" + second + end
        assert response.text.count(COMMENT) >= 2


async def test_a_client_of_http_1_0_gets_them_as_well(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, answer_late()) as heard:
        reader, writer = await asyncio.open_connection("127.0.0.1", heard.running.port)
        body = json.dumps({"model": MODEL, **BODIES["/v1/messages"], "stream": True}).encode()
        writer.write(
            b"POST /v1/messages HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert b"chunked" not in head
        assert rest.startswith(COMMENT.encode() * 2)
        assert rest.endswith(b"".join(ANSWERS["/v1/messages"]))


# -- what comes too late for a status ---------------------------------------------------------------------------------


async def test_another_node_serves_a_request_whose_stream_has_begun(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, hang_up_late, answer_late(0.0)) as heard:
        response = await heard.ask("/v1/chat/completions")
        assert response.text.replace(COMMENT, "") == b"".join(ANSWERS["/v1/chat/completions"]).decode()
        entry = await heard.last_entry()
        assert (entry["outcome"], entry["attempts"], entry["node"]) == ("served", 2, "b")


async def test_a_fallback_serves_a_request_whose_stream_has_begun(tmp_path: Path) -> None:
    unavailable = reply_late(whole_response(b'{"error":"busy"}', status="503 X"))
    both = json.dumps({"models": [{"name": name, "model": name} for name in (MODEL, "spare:latest")]}).encode()

    async def answer(exchange: Exchange) -> None:
        if route_of(exchange) == "/api/tags":
            await exchange.send(whole_response(both))
        elif exchange.body and json.loads(exchange.body)["model"] == MODEL:
            await unavailable(exchange)
        elif exchange.body:
            await answer_late(0.0)(exchange)
        else:
            await ollama_script(unavailable)(exchange)

    async with serve_scripts(tmp_path, answer, models=(ModelSpec(MODEL, fallback="spare"),), probes=False) as heard:
        response = await heard.ask("/v1/chat/completions")
        assert response.text.startswith(COMMENT)
        assert response.text.replace(COMMENT, "") == b"".join(ANSWERS["/v1/chat/completions"]).decode()


SERVER_ERRORS: dict[str, dict[str, Any]] = {
    "openai": {"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}},
    "anthropic": {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}},
    "native": {"error": "too long"},
}


async def test_an_error_of_the_server_becomes_the_last_frame(tmp_path: Path) -> None:
    """Also if the server writes it over several lines, or in the shape of another API."""

    async def answer(exchange: Exchange) -> None:
        dialect = json.loads(exchange.body)["user"]
        body = json.dumps(SERVER_ERRORS[dialect], indent=1).encode()
        await reply_late(whole_response(body, status="400 X"))(exchange)

    async with serve_scripts(tmp_path, answer) as heard:
        cases = [(path, dialect) for path in BODIES for dialect in SERVER_ERRORS]
        responses = await asyncio.gather(*(heard.ask(path, user=dialect) for path, dialect in cases))
        for (path, dialect), response in zip(cases, responses, strict=True):
            assert response.status_code == 200
            error = last_error(path, response.text)
            assert error["message"] == "too long", (path, dialect)
            if (path, dialect) == ("/v1/chat/completions", "openai"):
                assert error["code"] == "context_length_exceeded", "all that the server says"
        assert {(entry["outcome"], entry["status"]) for entry in heard.entries()} == {("refused", 200)}, "not served"


def last_error(path: str, text: str) -> dict[str, Any]:
    """What the error at the end of a stream says, which must stand as the clients of this route expect it."""
    if path.startswith("/api/"):
        last = json.loads(text.splitlines()[-1])
        return {"message": last["error"]}
    assert text.endswith("\n\n")
    last = events(text)[-1]
    is_named = path in ("/v1/messages", "/v1/responses")
    assert ("event: error\ndata: " in text) is is_named
    if path == "/v1/responses":
        assert last["type"] == "error"
        return dict(last)
    return dict(last["error"])


async def test_a_request_that_no_node_can_serve_ends_with_an_error_and_counts_as_failed(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, hang_up_late) as heard:
        # One after the other: the node's breaker would refuse the later ones before their streams begin.
        for path in ("/v1/responses", "/api/chat"):
            response = await heard.ask(path)
            assert response.status_code == 200
            assert last_error(path, response.text)["message"]
            entry = await heard.last_entry()
            assert (entry["outcome"], entry["status"], entry["ttft_ms"]) == ("failed", 200, None)
        assert heard.running.mesh.request_counters.served == 0


async def test_a_deadline_that_passes_in_the_wait_is_told_in_the_stream(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, answer_late(30.0)) as heard:
        body = {"model": MODEL, **BODIES["/v1/messages"], "stream": True}
        response = await heard.running.client.post("/v1/messages", json=body, headers={"X-GPUMesh-Timeout": "0.4"})
        assert "within" in last_error("/v1/messages", response.text)["message"]
        assert (await heard.last_entry())["outcome"] == "failed"


async def test_an_answer_in_one_piece_is_no_answer_to_a_client_that_reads_events(tmp_path: Path) -> None:
    whole = whole_response(b'{"id":"1","choices":[{"message":{"content":"Because"}}]}')
    async with serve_scripts(tmp_path, reply_late(whole)) as heard:
        response = await heard.ask("/v1/chat/completions")
        assert "a: it answered in one piece" in last_error("/v1/chat/completions", response.text)["message"]
        assert (await heard.last_entry())["outcome"] == "failed"


async def test_an_answer_in_one_piece_is_a_line_of_json(tmp_path: Path) -> None:
    """Ollama answers a request without a prompt, which loads the model, in one piece."""
    loaded = {"model": MODEL, "response": "", "done": True, "done_reason": "load"}
    whole = whole_response(json.dumps(loaded, indent=2).encode())
    async with serve_scripts(tmp_path, reply_late(whole)) as heard:
        response = await heard.ask("/api/generate", prompt="")
        assert lines(response.text) == [loaded]
        assert (await heard.last_entry())["outcome"] == "served"


async def test_an_answer_of_another_type_is_an_error(tmp_path: Path) -> None:
    """A node whose answer is so long that it is passed on as it comes, but is no stream of events."""
    length = (32 << 20) + 1

    async def answer(exchange: Exchange) -> None:
        await asyncio.sleep(SILENCE_S)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        await exchange.send(head.encode() + b'{"id":')
        await exchange.wait_client_gone()

    async with serve_scripts(tmp_path, answer) as heard:
        response = await heard.ask("/v1/chat/completions")
        assert "not the stream" in last_error("/v1/chat/completions", response.text)["message"]
        assert (await heard.last_entry())["outcome"] == "failed"


# -- the end of the wait ----------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_in_the_wait_ends_the_request_on_its_node(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.wait_client_gone()
        gone.set()

    async with serve_scripts(tmp_path, answer) as heard:
        body = {"model": MODEL, **BODIES["/v1/messages"], "stream": True}
        async with heard.running.client.stream("POST", "/v1/messages", json=body) as response:
            assert (await anext(response.aiter_text())).startswith(COMMENT)
        async with asyncio.timeout(5):
            await gone.wait()
        await wait_until(lambda: heard.running.mesh.request_counters.cancelled == 1, "the request has ended")
        assert (await heard.last_entry())["outcome"] == "cancelled"


async def test_a_gateway_that_stops_tells_the_clients_that_wait(tmp_path: Path) -> None:
    async with serve_scripts(tmp_path, answer_late(60.0), drain_s=0.3) as heard:
        body = {"model": MODEL, **BODIES["/v1/messages"], "stream": True}
        async with heard.running.client.stream("POST", "/v1/messages", json=body) as response:
            texts = response.aiter_text()
            first = await anext(texts)
            await heard.running.gateway.__aexit__(None, None, None)
            text = first + "".join([text async for text in texts])
        assert text.startswith(COMMENT)
        assert "the gateway was stopped" in last_error("/v1/messages", text)["message"]
        assert heard.entries()[-1]["outcome"] == "failed"
