"""A request at which servers fail before they have answered: a second server is asked, and not a third.

On real sockets. Where a server is killed, a real process dies.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pytest

from gpumesh.balancer.breaker import THRESHOLD, Breaker
from gpumesh.gateway import error_shapes
from gpumesh.gateway.model_requests import find_client_api
from tests.gateway.fleet import RunningGateway, node, serve_nodes
from tests.mesh.meshes import MODEL, ollama_script
from tests.mesh.mortal_server import mortal_server
from tests.mesh.servers import Exchange, serve, whole_response
from tests.tunnels.polling import wait_until

WORDS = "model runner has unexpectedly stopped"
MESSAGES = [{"role": "user", "content": "why?"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "why?"},
    "/api/embed": {"input": "why?"},
    "/api/embeddings": {"prompt": "why?"},
    "/api/show": {},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "why?"},
    "/v1/embeddings": {"input": "why?"},
    "/v1/responses": {"input": "why?"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
}
STREAMED = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages")


@dataclass
class Fleet:
    """``asked`` counts the requests to each server, without probes. ``behaviour`` is ``500``, ``ok`` or ``dies``."""

    behaviour: dict[str, str]
    asked: Counter[str] = field(default_factory=Counter)
    running: RunningGateway | None = None

    @property
    def client(self) -> Any:
        assert self.running is not None
        return self.running.client

    async def ask(self, path: str, *, stream: bool = False) -> Any:
        return await self.client.post(path, json={"model": MODEL, "stream": stream, **ROUTES[path]})


@asynccontextmanager
async def fleet(**behaviour: str) -> AsyncIterator[Fleet]:
    """Servers in the order in which they are asked."""
    made = Fleet(dict(behaviour))

    def of(name: str) -> Any:
        async def answer(exchange: Exchange) -> None:
            made.asked[name] += 1
            if made.behaviour[name] == "500":
                await exchange.send(
                    whole_response(json.dumps({"error": WORDS}).encode(), status="500 Internal Server Error")
                )
            elif made.behaviour[name] == "dies":
                exchange.close()
            else:
                await exchange.send(whole_response(b'{"done":true}'))

        return ollama_script(answer)

    async with AsyncExitStack() as stack:
        nodes = []
        for place, name in enumerate(behaviour):
            server = await stack.enter_async_context(serve(of(name)))
            nodes.append(replace(node(name, server.url, max_parallel=8), weight=0.001**place))
        made.running = await stack.enter_async_context(serve_nodes(tuple(nodes)))
        yield made


@pytest.mark.parametrize("path", ROUTES)
async def test_the_second_server_answers_for_the_first(path: str) -> None:
    async with fleet(a="500", b="ok", c="ok") as servers:
        for stream in (False, True) if path in STREAMED else (False,):
            response = await servers.ask(path, stream=stream)
            assert response.status_code == 200
            assert response.headers["X-GPUMesh-Attempts"] == "2"
        assert servers.asked["a"] == servers.asked.total() / 2


@pytest.mark.parametrize("path", ROUTES)
async def test_no_third_server_is_asked_where_two_have_failed(path: str) -> None:
    async with fleet(a="500", b="500", c="500", d="500") as servers:
        for stream in (False, True) if path in STREAMED else (False,):
            servers.asked.clear()
            response = await servers.ask(path, stream=stream)
            assert response.status_code == 500
            assert response.headers["X-GPUMesh-Attempts"] == "2"
            assert WORDS in response.text
            assert error_shapes.is_error_body(find_client_api(path), response.json()), "in the shape of the route's API"
            assert servers.asked.total() == len(servers.asked) == 2


async def test_both_of_two_servers_are_asked() -> None:
    async with fleet(a="500", b="500") as servers:
        response = await servers.ask("/api/chat")
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (500, "2")
        assert servers.asked == {"a": 1, "b": 1}


async def test_a_prompt_that_fails_everywhere_opens_no_breaker() -> None:
    """Otherwise a client that repeats the request would open the breakers of all nodes, and lock out other clients."""
    async with fleet(a="500", b="500", c="500") as servers:
        for _ in range(5 * THRESHOLD):
            assert (await servers.ask("/api/chat")).status_code == 500
        assert servers.running is not None
        assert all(one.usable for one in servers.running.mesh.candidates())
        servers.behaviour.update(a="ok", b="ok", c="ok")
        assert (await servers.ask("/api/chat")).headers["X-GPUMesh-Attempts"] == "1"


async def test_the_breaker_of_a_node_that_fails_alone_opens() -> None:
    async with fleet(a="500", b="ok") as servers:
        for _ in range(2 * THRESHOLD):
            assert (await servers.ask("/api/chat")).status_code == 200
        assert servers.asked["a"] == THRESHOLD


async def test_a_node_with_an_open_breaker_is_asked_rather_than_none() -> None:
    """Its breaker may be open for half a minute after it works again. Meanwhile the client would get the other node's
    500."""
    async with fleet(a="500", b="ok") as servers:
        assert servers.running is not None
        mesh = servers.running.mesh
        open_node = mesh.fleet["b"]
        open_node.ledger.breaker = Breaker(THRESHOLD, mesh._clock() + 30.0, 30.0)  # after faults that took minutes
        response = await servers.ask("/api/chat")
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "2")
        assert open_node.ledger.breaker == Breaker(), "it works again"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_request_at_which_servers_hang_up_is_sent_to_two_of_them(path: str) -> None:
    async with fleet(a="dies", b="dies", c="dies", d="ok") as servers:
        response = await servers.ask(path)
        assert response.status_code == 503
        said = response.json()["error"]
        assert "two servers failed at this request" in (said if isinstance(said, str) else said["message"])
        assert servers.asked.total() == 2


async def test_a_server_that_hangs_up_and_one_that_answers_500_are_two_failures() -> None:
    async with fleet(a="dies", b="500", c="ok") as servers:
        response = await servers.ask("/api/chat")
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (500, "2")
        assert servers.asked["c"] == 0


async def test_a_proxys_502_is_not_blamed_on_the_request() -> None:
    """502 and 503: no server had the request, so every node may be asked."""
    async with AsyncExitStack() as stack:
        nodes = []
        asked: Counter[str] = Counter()

        def of(name: str, status: str) -> Any:
            async def answer(exchange: Exchange) -> None:
                asked[name] += 1
                await exchange.send(whole_response(b'{"done":true}', status=status))

            return ollama_script(answer)

        for place, (name, status) in enumerate(
            (("a", "502 Bad Gateway"), ("b", "503 Busy"), ("c", "502 Bad Gateway"), ("d", "200 OK"))
        ):
            server = await stack.enter_async_context(serve(of(name, status)))
            nodes.append(replace(node(name, server.url, max_parallel=8), weight=0.001**place))
        running = await stack.enter_async_context(serve_nodes(tuple(nodes)))
        response = await running.client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, "stream": False})
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "4")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/pull", {"model": MODEL}),
        ("POST", "/api/create", {"model": "n", "from": MODEL}),
        ("POST", "/api/push", {"model": MODEL}),
        ("POST", "/api/copy", {"source": MODEL, "destination": "n"}),
        ("DELETE", "/api/delete", {"model": MODEL}),
    ],
)
@pytest.mark.parametrize("behaviour", ["500", "dies"])
async def test_a_change_of_a_store_is_sent_to_each_server_once(
    method: str, path: str, body: dict[str, Any], behaviour: str
) -> None:
    async with fleet(a=behaviour, b="ok") as servers:
        request = servers.client.request(method, path, json={**body, "stream": False}, headers={"X-GPUMesh-Node": "a"})
        if (path, behaviour) == ("/api/pull", "dies"):
            # Ollama continues a pull where it was cut, so it is started again, for many seconds.
            async with asyncio.TaskGroup() as group:
                pull = group.create_task(request)
                await wait_until(lambda: servers.asked["a"] > 1, "the pull is started again")
                pull.cancel()
            assert set(servers.asked) == {"a"}
            return
        response = await request
        assert response.status_code >= 500
        assert servers.asked == {"a": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_kills_its_server_is_not_sent_to_a_third(stream: bool) -> None:
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(mortal_server("why?")) for name in "abc"}
        nodes = tuple(node(name, f"http://127.0.0.1:{port}", max_parallel=8) for name, (port, _) in servers.items())
        running = await stack.enter_async_context(serve_nodes(nodes))
        body = {"model": MODEL, "messages": MESSAGES, "stream": stream}
        response = await running.client.post("/api/chat", json=body)
        assert response.status_code == 503
        assert "two servers failed at this request" in response.json()["error"]
        processes = [process for _, process in servers.values()]
        waits = [asyncio.ensure_future(process.wait()) for process in processes]
        assert [await ended for ended in islice(asyncio.as_completed(waits), 2)] == [9, 9]
        (third,) = (process for process in processes if process.returncode is None)
        third.kill()  # after the ends of the others are known: asyncio checks a process when it kills it
        assert await third.wait() == -9
        await asyncio.gather(*waits)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_page_of_a_proxy_becomes_an_error_in_the_clients_api(path: str) -> None:
    async def answer(exchange: Exchange) -> None:
        page = b"<html><script>alert(1)</script><title>502 Bad Gateway</title></html>"
        await exchange.send(whole_response(page, status="502 Bad Gateway", kind="text/html"))

    async with serve(ollama_script(answer)) as server, serve_nodes((node("a", server.url, max_parallel=8),)) as running:
        body = {"model": MODEL, "stream": False, **ROUTES[path]}
        response = await running.client.post(path, json=body)
        assert (response.status_code, response.headers["Content-Type"]) == (502, "application/json")
        assert error_shapes.is_error_body(find_client_api(path), response.json())
        assert "<" not in response.text
