"""A body that is read once, on its way to one node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gpumesh.errors import BackendUnreachable, DeadlineExceeded, SecretMissing
from tests.mesh.meshes import mesh_of_nodes, node, ollama_script
from tests.mesh.servers import Exchange, serve, whole_response

PATH = "/api/blobs/sha256:0"


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def chunks(exchange: Exchange) -> bytes:
    """What was sent, which these servers do not read by themselves."""
    said = b""
    while size := int(await exchange.reader.readline(), 16):
        said += await exchange.reader.readexactly(size)
        await exchange.reader.readline()
    await exchange.reader.readline()
    return said


async def test_it_arrives_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_KEY", "k-12345")
    seen: list[tuple[bytes, bytes]] = []

    async def store(exchange: Exchange) -> None:
        seen.append((exchange.head, await chunks(exchange)))
        await exchange.send(whole_response(b"stored", status="201 Created"))

    async with serve(ollama_script(store)) as server:
        spec = node("a", server.url)
        keyed = replace(spec, backend=replace(spec.backend, api_key_env="UPLOAD_KEY"))
        async with mesh_of_nodes(keyed) as running:
            answer = await running.mesh.upload("a", PATH, body(b"one ", b"two"), timeout_s=10)
            assert (answer.status, await answer.read()) == (201, b"stored")
            assert running.wait_settled()
    ((head, said),) = seen
    assert said == b"one two"
    assert head.startswith(b"POST /api/blobs/sha256:0 HTTP/1.1\r\n")
    assert b"host: 127.0.0.1:%d\r\n" % server.port in head.lower()
    assert b"authorization: bearer k-12345\r\n" in head.lower()


async def test_a_server_that_refuses_is_an_answer() -> None:
    async def refuse(exchange: Exchange) -> None:
        await chunks(exchange)
        await exchange.send(whole_response(b'{"error":"digest mismatch"}', status="400 Bad Request"))

    async with serve(ollama_script(refuse)) as server, mesh_of_nodes(node("a", server.url)) as running:
        answer = await running.mesh.upload("a", PATH, body(b"x"), timeout_s=10)
        assert (answer.status, await answer.read()) == (400, b'{"error":"digest mismatch"}')


async def test_a_server_that_breaks_off_is_told_and_not_tried_again() -> None:
    tries = 0

    async def break_off(exchange: Exchange) -> None:
        nonlocal tries
        tries += 1
        exchange.reset()

    async with serve(ollama_script(break_off)) as server, mesh_of_nodes(node("a", server.url)) as running:
        with pytest.raises(BackendUnreachable, match="the upload broke off"):
            await running.mesh.upload("a", PATH, body(*[b"x" * 65536] * 100), timeout_s=10)
        assert running.wait_settled()
    assert tries == 1


async def test_a_deadline_and_a_client_that_leaves_end_it() -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def never(exchange: Exchange) -> None:
        await chunks(exchange)
        begun.set()
        await exchange.wait_client_gone()
        gone.set()

    async with serve(ollama_script(never)) as server, mesh_of_nodes(node("a", server.url)) as running:
        with pytest.raises(DeadlineExceeded):
            await running.mesh.upload("a", PATH, body(b"x"), timeout_s=0.2)
        await asyncio.wait_for(gone.wait(), 10)
        begun.clear()
        gone.clear()
        leaving = asyncio.create_task(running.mesh.upload("a", PATH, body(b"x"), timeout_s=60))
        await asyncio.wait_for(begun.wait(), 10)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.wait_for(gone.wait(), 10)
        assert running.wait_settled()


async def test_a_key_that_went_missing_costs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_KEY", "k-12345")

    async def unasked(exchange: Exchange) -> None:
        raise AssertionError("nothing should come")

    async with serve(ollama_script(unasked)) as server:
        spec = node("a", server.url)
        keyed = replace(spec, backend=replace(spec.backend, api_key_env="UPLOAD_KEY"))
        async with mesh_of_nodes(keyed) as running:
            monkeypatch.delenv("UPLOAD_KEY")
            with pytest.raises(SecretMissing):
                await running.mesh.upload("a", PATH, body(b"x"), timeout_s=10)
            assert running.wait_settled()
