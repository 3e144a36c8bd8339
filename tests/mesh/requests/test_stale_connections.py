"""Kept-alive connections that end when a request is sent over them: how often the request is executed, and counted."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import islice

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import ServersFailed
from gpumesh.mesh.requests import failures
from gpumesh.topology import BackendKind
from tests.mesh.meshes import RunningMesh, make_call, mesh_of_nodes, node, ollama_script, send
from tests.mesh.mortal_server import mortal_server
from tests.mesh.servers import Exchange, serve, whole_response

WHOLE = whole_response(b'{"message":{"content":"y"},"done":true}')


class Closer:
    """Answers requests, but closes the connection at a request that says ``die``, and at the ``stale_number``-th
    request on a connection. ``executed``: the requests that say ``die``."""

    def __init__(self, *, stale_number: int | None = None) -> None:
        self.stale_number = stale_number
        self.dies = True
        self.executed = 0
        self.together = asyncio.Event()
        self.waiting = 0

    async def answer(self, exchange: Exchange) -> None:
        if self.dies and b"die" in exchange.body:
            self.executed += 1
            exchange.close()
        elif exchange.number == self.stale_number:
            exchange.close()
        else:
            self.waiting += 1
            await self.together.wait()
            await exchange.send(WHOLE)

    async def keep_alive(self, running: RunningMesh, count: int) -> None:
        """Leaves so many idle connections: so many requests are answered at the same time."""
        sending = [asyncio.create_task(send(running.mesh, make_call(stream=False))) for _ in range(count)]
        while self.waiting < count:
            await asyncio.sleep(0)
        self.together.set()
        for answer in await asyncio.gather(*sending):
            await answer.read()


def dying_call() -> HttpCall:
    return make_call(messages=[{"role": "user", "content": "die"}], stream=False)


async def test_a_stale_connection_is_no_failure_and_is_counted() -> None:
    closer = Closer(stale_number=2)
    async with serve(ollama_script(closer.answer)) as server, mesh_of_nodes(node("a", server.url)) as running:
        await closer.keep_alive(running, 1)
        answer = await send(running.mesh, make_call(stream=False))
        assert (answer.status, answer.attempts) == (200, 1)
        assert running.attempts("a") == {Outcome.SERVED: 2, Outcome.STALE_CONNECTION: 1}
        load = running.mesh.snapshot().nodes[0].load
        assert (load.served, load.failed) == (2, 0)


async def test_idle_connections_are_not_used_one_after_the_other_for_a_request_that_they_end_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them ends after some work: as long as it takes here."""
    monkeypatch.setattr(failures, "MIN_SERVER_S", 0.0)
    monkeypatch.setattr(failures, "MIN_SERVER_RTTS", 0.0)
    closer = Closer()
    async with serve(ollama_script(closer.answer)) as server, mesh_of_nodes(node("a", server.url)) as running:
        await closer.keep_alive(running, 13)
        with pytest.raises(ServersFailed, match="the server failed twice at this request"):
            await send(running.mesh, dying_call())
        assert closer.executed == 2
        assert running.attempts("a") == {Outcome.SERVED: 13, Outcome.UNREACHABLE: 2}, "each execution is in the counts"
        assert running.mesh.request_counters.failed == 1


async def test_a_connection_that_ends_at_once_is_replaced_once() -> None:
    closer = Closer()
    async with serve(ollama_script(closer.answer)) as server, mesh_of_nodes(node("a", server.url)) as running:
        await closer.keep_alive(running, 13)
        with pytest.raises(ServersFailed):
            await send(running.mesh, dying_call())
        assert running.attempts("a") == {Outcome.SERVED: 13, Outcome.UNREACHABLE: 1, Outcome.STALE_CONNECTION: 1}
        assert closer.executed == 2


async def test_after_a_failure_of_a_server_the_next_gets_the_request_over_a_new_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There the end of a kept-alive connection could not be told from one more failure at the request."""
    monkeypatch.setattr(failures, "MIN_SERVER_S", 0.0)
    monkeypatch.setattr(failures, "MIN_SERVER_RTTS", 0.0)
    first, second = Closer(), Closer(stale_number=2)
    second.dies = False
    async with (
        serve(ollama_script(first.answer)) as a,
        serve(ollama_script(second.answer)) as b,
        mesh_of_nodes(node("a", a.url, weight=100.0), node("b", b.url)) as running,
    ):
        first.together.set()
        second.together.set()
        await (await send(running.mesh, make_call(stream=False), node="b")).read()
        answer = await send(running.mesh, dying_call())
        assert (answer.status, answer.node, answer.attempts) == (200, "b", 2)
        assert running.attempts("b") == {Outcome.SERVED: 2}


async def test_what_must_not_be_done_twice_goes_over_a_new_connection() -> None:
    closer = Closer(stale_number=2)
    async with serve(ollama_script(closer.answer)) as server, mesh_of_nodes(node("a", server.url)) as running:
        await closer.keep_alive(running, 1)
        calls = dict.fromkeys(BackendKind, make_call(stream=False))
        answer = await running.mesh.send(Demand(model="m"), calls, timeout_s=10.0, at_most_once=True)
        assert answer.status == 200
        assert Outcome.STALE_CONNECTION not in running.attempts("a")


async def test_a_prompt_that_kills_its_servers_over_kept_alive_connections_reaches_two_of_them() -> None:
    """A process that dies at once ends its connection as a stale one ends. But then it cannot be reached anew."""
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(mortal_server("die")) for name in "abc"}
        nodes = [node(name, f"http://127.0.0.1:{port}") for name, (port, _) in servers.items()]
        running = await stack.enter_async_context(mesh_of_nodes(*nodes))
        for name in servers:
            answer = await send(running.mesh, make_call(stream=False), node=name)
            assert answer.status == 200
        with pytest.raises(ServersFailed, match="two servers failed at this request"):
            await send(running.mesh, dying_call())
        waits = [asyncio.ensure_future(process.wait()) for _, process in servers.values()]
        assert [await ended for ended in islice(asyncio.as_completed(waits), 2)] == [9, 9]
        (third,) = (process for _, process in servers.values() if process.returncode is None)
        third.kill()
        assert await third.wait() == -9
        await asyncio.gather(*waits)


@pytest.mark.parametrize(
    "garbage", [b"hello\r\n\r\n", b"SSH-2.0-x\r\n", b"ICY 200 OK\r\n\r\n", b"HTTP/1.1 2", b"\x00\x12"]
)
async def test_a_connection_that_brings_something_else_is_not_stale(garbage: bytes) -> None:
    """The server has got the request, and has worked on it or not: it must not get it once more."""
    executed = 0

    async def answer(exchange: Exchange) -> None:
        nonlocal executed
        if exchange.number == 1:
            await exchange.send(WHOLE)
            return
        executed += 1
        await exchange.send(garbage)
        exchange.close()

    async with (
        serve(ollama_script(answer)) as server,
        serve(ollama_script(lambda exchange: exchange.send(WHOLE))) as other,
        mesh_of_nodes(node("a", server.url), node("b", other.url)) as running,
    ):
        running.mesh.drain("b")
        await send(running.mesh, make_call(stream=False))
        running.mesh.resume("b")
        answers = [await send(running.mesh, make_call(stream=False)) for _ in range(2)]
        assert [one.status for one in answers] == [200, 200]
        assert executed == running.attempts("a")[Outcome.UNREACHABLE] == 1
        assert Outcome.STALE_CONNECTION not in running.attempts("a")
