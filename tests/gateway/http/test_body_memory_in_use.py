"""What a gateway holds of bodies: counted on every path, bounded, and free as soon as a request ends."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256
from random import Random
from typing import Any

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.gateway.http.bodies.body_memory import BodyMemory
from gpumesh.gateway.http.bounds import Bounds
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import MODEL, A, B, RunningGateway, node, quick_host, send_raw, serve_hosts, serve_nodes
from tests.gateway.http.raw_clients import post, read_answer
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

MIB = 1 << 20
TIGHT = Bounds(total_body_bytes=16 * MIB, linger_s=0.2)  # of which 14 are for large ones
SLOW = quick_host("slow", tokens_per_s=20.0, answer_tokens=(200, 200))


def chat(size: int, **more: object) -> bytes:
    """A chat whose body is of about this size."""
    image = "A" * size
    message = {"role": "user", "content": "hi", "images": [image]}
    return json.dumps({"model": MODEL, "messages": [message], "stream": False, **more}).encode()


def memory_of(fleet: RunningGateway) -> BodyMemory:
    return fleet.gateway._server.memory


async def wait_until_free(fleet: RunningGateway) -> None:
    memory = memory_of(fleet)
    await wait_until(lambda: memory.held == 0 and not memory.reading_since, "nothing is held")


@pytest.fixture
async def tight() -> AsyncIterator[RunningGateway]:
    async with serve_hosts(A, B, bounds=TIGHT) as fleet:
        yield fleet


async def half_sent(fleet: RunningGateway, size: int) -> asyncio.StreamWriter:
    """A body of which all but the end has come."""
    before = memory_of(fleet).held
    _, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
    body = chat(size)
    writer.write(post(body[:-1], length=len(body)))
    await wait_until(lambda: memory_of(fleet).held >= before + size, "it has come")
    return writer


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/chat", {"error": ...}),
        ("/v1/chat/completions", {"error": {"type": "api_error"}}),
        ("/v1/messages", {"type": "error", "error": {"type": "overloaded_error"}}),
    ],
)
async def test_past_the_memory_clients_get_503_in_their_dialect(
    tight: RunningGateway, path: str, error: dict[str, Any]
) -> None:
    holders = [await half_sent(tight, 4 * MIB) for _ in range(3)]
    answer = await tight.client.post(path, content=chat(4 * MIB))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    said = answer.json()
    for key, value in error.items():
        assert value is ... or (said[key] == value if isinstance(value, str) else value.items() <= said[key].items())
    assert "gateway.body_memory_mib" in answer.text
    assert (await tight.chat()).status_code == 200, "small ones go on"
    holders[0].write(b"}")
    async with asyncio.timeout(20):
        assert await _status_after(tight, 4 * MIB) == 200
    for writer in holders:
        writer.close()
    await wait_until_free(tight)


async def _status_after(fleet: RunningGateway, size: int) -> int:
    while (status := (await fleet.client.post("/api/chat", content=chat(size))).status_code) == 503:
        await asyncio.sleep(0.01)  # as the client was told to
    return status


async def test_a_chunked_body_is_refused_when_it_finds_no_more_room(tight: RunningGateway) -> None:
    holders = [await half_sent(tight, 4 * MIB) for _ in range(3)]

    async def pieces() -> AsyncIterator[bytes]:
        body = chat(4 * MIB)
        for start in range(0, len(body), 64 << 10):
            yield body[start : start + (64 << 10)]

    answer = await tight.client.post("/api/chat", content=pieces())
    assert answer.status_code == 503
    for writer in holders:
        writer.close()
    await wait_until_free(tight)


async def test_bodies_that_together_do_not_fit_never_wait_for_each_other(tight: RunningGateway) -> None:
    """Each announces nothing, and all come at once."""

    async def send() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", tight.port)
        # Read while the body is sent: a connection that was closed by a refusal loses what nobody has read yet.
        answer = asyncio.create_task(read_answer(reader))
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        body = chat(4 * MIB)
        with suppress(ConnectionError):
            for start in range(0, len(body), 128 << 10):
                if answer.done():
                    break
                writer.write(chunk(body[start : start + (128 << 10)]))
                await writer.drain()
                await asyncio.sleep(0)
            else:
                writer.write(b"0\r\n\r\n")
        status, _ = await answer
        writer.close()
        return status

    async with asyncio.timeout(30):
        statuses = await asyncio.gather(*(send() for _ in range(8)))
    assert set(statuses) == {200, 503}
    await wait_until_free(tight)


async def test_an_announced_body_holds_nothing(tight: RunningGateway) -> None:
    liars = [await asyncio.open_connection("127.0.0.1", tight.port) for _ in range(8)]
    for _, writer in liars:
        writer.write(post(b"", length=13 * MIB) + b"{")
    await wait_until(lambda: len(memory_of(tight).reading_since) == 8, "all are being read")
    assert (await tight.client.post("/api/chat", content=chat(12 * MIB))).status_code == 200
    for _, writer in liars:
        writer.close()
    await wait_until_free(tight)


async def test_a_slow_body_makes_room_for_others() -> None:
    async with serve_hosts(
        A, bounds=Bounds(total_body_bytes=16 * MIB, body_timeout_s=0.3, min_bytes_per_s=1000)
    ) as fleet:
        reader, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        body = chat(13 * MIB)
        writer.write(post(body[:-1], length=len(body)))
        await wait_until(lambda: memory_of(fleet).held >= 13 * MIB, "it has come, all but the end")
        async with asyncio.timeout(20):
            assert await _status_after(fleet, 4 * MIB) == 200
            assert (await read_answer(reader))[0] == 503
        writer.close()
        await wait_until_free(fleet)


async def test_a_queued_body_is_counted_and_freed_when_its_client_leaves() -> None:
    async with serve_hosts(SLOW, max_parallel=1, bounds=TIGHT) as fleet:
        first = asyncio.create_task(fleet.client.post("/api/chat", content=chat(4 * MIB)))
        await wait_until(lambda: fleet.count_running() == 1, "one runs")
        waiting = [asyncio.create_task(fleet.client.post("/api/chat", content=chat(4 * MIB))) for _ in range(2)]
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 2, "two wait")
        assert memory_of(fleet).held >= 12 * MIB
        assert (await fleet.client.post("/api/chat", content=chat(4 * MIB))).status_code == 503
        waiting[0].cancel()
        await wait_until(lambda: memory_of(fleet).held < 9 * MIB, "it left the queue")
        for task in (first, *waiting):
            task.cancel()
        await wait_until_free(fleet)


async def test_every_end_of_a_request_frees_its_body() -> None:
    spec = GatewaySpec(default_model=MODEL)
    async with serve_hosts(A, B, bounds=TIGHT, spec=spec) as fleet:
        post_, large = fleet.client.post, chat(2 * MIB)
        packed = {"Content-Encoding": "gzip"}
        assert (await post_("/api/chat", content=large)).status_code == 200
        assert (await post_("/api/chat", content=large.replace(b'"model"', b'"Model"'))).status_code == 200
        assert (await post_("/api/chat", content=large.replace(MODEL.encode(), b""))).status_code == 200
        assert (await post_("/api/chat", content=large + b"x")).status_code == 400
        assert (await post_("/api/chat", content=large.replace(MODEL.encode(), b"none"))).status_code == 404
        assert (await post_("/api/nothing", content=large)).status_code == 404
        assert (await post_("/api/tags", content=large)).status_code == 405
        assert (await post_("/api/chat", content=large, headers={"X-GPUMesh-Node": "none"})).status_code == 400
        image = base64.b64encode(Random(1).randbytes(2 * MIB))
        packed_image = gzip.compress(large.replace(b"A" * 2 * MIB, image))
        assert (await post_("/api/chat", content=packed_image, headers=packed)).status_code == 200
        assert (await post_("/api/chat", content=gzip.compress(b" " * 9 * MIB), headers=packed)).status_code == 413
        assert (await post_("/api/chat", content=b"x" * 2 * MIB, headers=packed)).status_code == 400
        assert (await post_("/api/delete", content=large)).status_code in (404, 405, 413)
        assert (await fleet.client.request("GET", "/api/tags", content=large)).status_code == 200
        await wait_until_free(fleet)
        writer = await half_sent(fleet, 3 * MIB)
        writer.transport.abort()
        await wait_until_free(fleet)
        # Of what was asked ahead nothing is served once the first is refused.
        ahead = post(b"x", "Content-Length: 2") + post(large) * 3
        assert await send_raw(fleet.port, ahead)
        await wait_until_free(fleet)


async def test_a_client_that_leaves_in_its_answer_frees_its_body() -> None:
    async with serve_hosts(SLOW, bounds=TIGHT) as fleet:
        async with fleet.client.stream("POST", "/api/chat", content=chat(3 * MIB, stream=True)) as answer:
            async for _ in answer.aiter_bytes():
                assert memory_of(fleet).held >= 3 * MIB
                break
        await wait_until_free(fleet)


def inventory() -> bytes:
    """What an Ollama says to any question about itself."""
    return whole_response(b'{"version":"1","models":[{"name":"%s"}]}' % MODEL.encode())


async def test_a_second_node_gets_the_same_body() -> None:
    bodies: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        if b"/api/chat" not in exchange.head:
            await exchange.send(inventory())
            return
        bodies.append(exchange.body)
        status = "500 Internal Server Error" if len(bodies) == 1 else "200 OK"
        await exchange.send(whole_response(b'{"done":true,"message":{"content":"hi"}}', status=status))

    async with (
        serve(script) as one,
        serve(script) as two,
        serve_nodes((node("a", one.url), node("b", two.url)), bounds=TIGHT) as fleet,
    ):
        body = chat(3 * MIB)
        assert (await fleet.client.post("/api/chat", content=body)).status_code == 200
        assert bodies == [body, body]
        await wait_until_free(fleet)


async def test_a_passing_body_counts_as_its_buffered_bytes(tight: RunningGateway) -> None:
    blob = bytes(range(256)) * (24 * MIB // 256)
    digest = sha256(blob).hexdigest()
    answer = await tight.client.post(f"/api/blobs/sha256:{digest}", content=blob)
    assert answer.status_code == 201
    await wait_until_free(tight)


async def test_a_cut_answer_to_a_too_large_request_ends_in_an_error() -> None:
    async def script(exchange: Exchange) -> None:
        if b"/api/chat" not in exchange.head:
            await exchange.send(inventory())
            return
        await exchange.send(chunked_head() + chunk(b'{"message":{"content":"a"},"done":false}\n'))
        exchange.reset()

    def empties(count: int) -> bytes:
        head, message = b'{"model":"%s","messages":[' % MODEL.encode(), b'{"role":"user","content":"hi"}]}'
        return head + b"[]," * count + message

    async with (
        serve(script) as one,
        serve(script) as two,
        serve_nodes((node("a", one.url), node("b", two.url)), bounds=Bounds(total_body_bytes=64 * MIB)) as fleet,
    ):
        answer = await fleet.client.post("/api/chat", content=empties(4 * MIB))
        assert "too large to be taken apart" in answer.text
        few = empties(MIB // 8)
        answer = await fleet.client.post("/api/chat", content=few)
        assert "too large" not in answer.text, "it was continued, and cut again"
        holder = await half_sent(fleet, 40 * MIB)
        answer = await fleet.client.post("/api/chat", content=few)
        assert "too large to be taken apart" in answer.text, "there is no room for its parts"
        holder.close()
        await wait_until_free(fleet)


def held() -> list[int]:
    """The sizes of the large bodies that exist. They were made while the garbage collector was off, so they are among
    the youngest objects; all objects are millions."""
    return [len(one.body) for one in gc.get_objects(generation=0) if isinstance(one, HttpCall) and len(one.body) > MIB]


async def test_a_body_is_gone_with_its_request_and_not_when_garbage_is_collected() -> None:
    """Else the memory would be free by the count alone."""
    chats = 0

    async def script(exchange: Exchange) -> None:
        nonlocal chats
        if b"/api/chat" not in exchange.head:
            await exchange.send(inventory())
            return
        chats += 1
        if chats == 1:
            await exchange.send(whole_response(b'{"error":"no"}', status="502 Bad Gateway"))
        elif chats == 2:
            exchange.reset()
        elif chats in (3, 4):
            await exchange.send(whole_response(b'{"done":true,"message":{"content":"hi"}}'))
        elif chats == 5:
            await exchange.send(chunked_head() + chunk(b'{"message":{"content":"a"},"done":false}\n'))
            exchange.reset()
        else:
            await exchange.send(chunked_head() + chunk(b'{"message":{"content":"a"},"done":false}\n'))
            await exchange.wait_client_gone()

    async with (
        serve(script) as one,
        serve(script) as two,
        serve(script) as three,
        serve_nodes((node("a", one.url), node("b", two.url), node("c", three.url)), bounds=TIGHT) as fleet,
    ):
        gc.collect()
        gc.disable()
        try:
            moved = await fleet.client.post("/api/chat", content=chat(3 * MIB))
            assert (moved.status_code, moved.headers["X-GPUMesh-Attempts"]) == (200, "3")
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
            assert (await fleet.client.post("/api/chat", content=chat(3 * MIB))).status_code == 200
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
            cut = await fleet.client.post("/api/chat", content=chat(3 * MIB, stream=True))
            assert "too large to be taken apart" in cut.text
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
            async with fleet.client.stream("POST", "/api/chat", content=chat(3 * MIB, stream=True)) as answer:
                pieces = answer.aiter_bytes()
                assert b'"a"' in await anext(pieces)
                assert held(), "it is under way"
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
        finally:
            gc.enable()


@pytest.mark.parametrize("resets", [False, True])
async def test_a_body_at_which_two_servers_failed_is_gone_with_its_request(resets: bool) -> None:
    async def script(exchange: Exchange) -> None:
        if b"/api/chat" not in exchange.head and b"/api/copy" not in exchange.head:
            await exchange.send(inventory())
        elif resets:
            exchange.reset()
        else:
            await exchange.send(whole_response(b'{"error":"no"}', status="500 Internal Server Error"))

    async with (
        serve(script) as one,
        serve(script) as two,
        serve(script) as three,
        serve_nodes((node("a", one.url), node("b", two.url), node("c", three.url)), bounds=TIGHT) as fleet,
    ):
        gc.collect()
        gc.disable()
        try:
            failed = await fleet.client.post("/api/chat", content=chat(3 * MIB))
            assert failed.status_code >= 500
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
            copy = {"source": MODEL, "destination": "other", "more": "A" * 2 * MIB}
            failed = await fleet.client.post("/api/copy", json=copy)
            assert failed.status_code >= 500
            await wait_until_free(fleet)
            await wait_until(lambda: not held(), "it is gone")
        finally:
            gc.enable()
