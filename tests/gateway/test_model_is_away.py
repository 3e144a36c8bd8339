"""404 is said only if no node of the mesh has the model. If a node has it and cannot be used now, it is 503."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gpumesh.balancer import breaker
from gpumesh.balancer.base import Demand
from gpumesh.balancer.breaker import THRESHOLD, Breaker
from gpumesh.mesh.nodes import snapshot
from gpumesh.state import TunnelPhase
from gpumesh.topology import ModelSpec
from tests.gateway.fleet import RunningGateway, node, serve_nodes
from tests.mesh.servers import Exchange, ScriptedServer, serve, whole_response
from tests.tunnels.polling import wait_until

TOO_LARGE = (500, "model requires more system memory (7.5 GiB) than is available (5.2 GiB)")
GONE = (404, "model 'big:latest' not found")
NO_ROUTE = (404, "404 page not found")
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": [{"role": "user", "content": "?"}], "stream": False},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "?"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "?"}], "max_tokens": 9},
    "/v1/embeddings": {"input": "?"},
    "/api/show": {},
}


@dataclass
class Ollama:
    """``errors``: by model, the status and message of all answers. ``is_ill``: probes get 503."""

    models: tuple[str, ...]
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    is_ill: bool = False

    async def answer(self, exchange: Exchange) -> None:
        path = exchange.head.split(b" ", 2)[1]
        documents = {
            b"/api/version": {"version": "0.12.6"},
            b"/api/tags": {"models": [{"name": name} for name in self.models]},
            b"/api/ps": {"models": []},
            b"/v1/models": {"object": "list", "data": [{"id": name} for name in self.models]},
        }
        status, document = 200, documents.get(path)
        if document is None:
            document = {"message": {"role": "assistant", "content": "y"}, "done": True}
            status, message = self.errors.get(json.loads(exchange.body)["model"], (200, ""))
            if status != 200:
                document = {"error": message}
        elif self.is_ill:
            status, document = 503, {"error": "starting"}
        await exchange.send(whole_response(json.dumps(document).encode(), status=f"{status} X"))


@dataclass
class Fleet:
    """Node ``a`` has ``big`` and ``small``, node ``b`` only ``small``."""

    a: Ollama
    b: Ollama
    running: RunningGateway
    servers: list[ScriptedServer]

    async def ask(self, path: str = "/api/chat", model: str = "big") -> Any:
        return await self.running.client.post(path, json={"model": model, **BODIES[path]})

    async def refresh(self) -> None:
        for one in self.running.mesh.fleet:
            await one.refresh()


@asynccontextmanager
async def serve_fleet(*rules: ModelSpec) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        a, b = Ollama(("big:latest", "small:latest")), Ollama(("small:latest",))
        servers = [await stack.enter_async_context(serve(ollama.answer)) for ollama in (a, b)]
        specs = (node("a", servers[0].url, max_parallel=8), replace(node("b", servers[1].url), weight=0.001))
        running = await stack.enter_async_context(serve_nodes(specs, models=rules))
        yield Fleet(a, b, running, servers)


async def drain(fleet: Fleet) -> None:
    fleet.running.mesh.drain("a")


async def break_server(fleet: Fleet) -> None:
    fleet.a.is_ill = True
    await fleet.refresh()
    await fleet.refresh()


async def break_model(fleet: Fleet) -> None:
    fleet.a.errors["big"] = TOO_LARGE
    assert (await fleet.ask()).status_code == 500, "the server's own error, the first time"


async def lose_for_long(fleet: Fleet) -> None:
    one = fleet.running.mesh.fleet["a"]
    tunnel = one.tunnel
    assert tunnel is not None
    one.on_tunnel(replace(tunnel.state, state=TunnelPhase.BACKOFF, last_error="refused"))
    assert one._link.away_since is not None
    one._link.away_since -= snapshot.MAX_AWAY_S + 1.0


@pytest.mark.parametrize("make_unusable", [drain, break_server, break_model, lose_for_long])
async def test_a_model_of_a_node_that_cannot_be_used_is_not_missing(
    make_unusable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A request would wait for the end of a shorter pause, and be the trial.
    monkeypatch.setattr(breaker, "MODEL_PACE", breaker.BreakerPace(3, 60.0, 300.0))
    async with serve_fleet() as fleet:
        await make_unusable(fleet)
        for path in BODIES:
            if path == "/api/show" and make_unusable is break_model:
                continue  # the model store has it
            response = await fleet.ask(path)
            assert response.status_code == 503, (path, response.text)
            assert int(response.headers["Retry-After"]) >= 2
            assert "big" in response.text
        for path in ("/api/chat", "/v1/chat/completions"):
            response = await fleet.ask(path, "nowhere")
            assert response.status_code == 404, "no node has it"
            assert "Retry-After" not in response.headers
        assert (await fleet.ask(model="small")).status_code == 200, "the other models are served"


async def test_a_waiting_that_is_hopeless_does_not_begin() -> None:
    """A request waits 6 s for a node that may come back. A draining node, and one that is away for long, do not."""
    async with serve_fleet() as fleet:
        mesh = fleet.running.mesh
        await lose_for_long(fleet)
        assert not mesh.fleet["a"].may_recover("big")
        response = await fleet.ask()
        assert response.status_code == 503
        assert "is on a, which cannot be used now" in response.text


async def test_a_node_whose_breaker_is_open_still_has_its_models() -> None:
    async with serve_fleet() as fleet:
        mesh = fleet.running.mesh
        mesh.fleet["a"].ledger.breaker = Breaker(THRESHOLD, mesh._clock() + 30.0, 30.0)
        error = mesh.fleet.explain_no_node(Demand("big"))
        assert "is on a, which cannot be used now" in error.message
        assert error.code == "no-node"


async def test_a_server_that_lacks_a_model_does_not_speak_for_the_others() -> None:
    """The server of ``b`` lists the model, and answers 404. ``a`` has it, but is draining."""
    async with serve_fleet() as fleet:
        fleet.b.models = ("big:latest", "small:latest")
        fleet.b.errors["big"] = GONE
        await fleet.refresh()
        fleet.running.mesh.drain("a")
        for _ in range(2):
            response = await fleet.ask()
            assert response.status_code == 503
            assert "Retry-After" in response.headers
        fleet.running.mesh.resume("a")
        fleet.a.errors["big"] = GONE
        for _ in range(2):
            response = await fleet.ask()
            assert response.status_code == 404, "now no node has it"


@pytest.mark.parametrize("missing", [GONE, NO_ROUTE])
async def test_the_failure_of_a_node_with_the_model_comes_before_a_404_of_another(missing: tuple[int, str]) -> None:
    async with serve_fleet() as fleet:
        fleet.b.models = ("big:latest", "small:latest")
        fleet.b.errors["big"] = missing
        fleet.a.errors["big"] = (502, "the server behind it is down")
        await fleet.refresh()
        response = await fleet.ask()
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (502, "2")


async def test_a_disabled_node_is_no_node_and_is_not_waited_for() -> None:
    a = Ollama(("small:latest",))
    off = replace(node("off", "http://127.0.0.1:9"), enabled=False)
    async with serve(a.answer) as server, serve_nodes((node("a", server.url), off)) as running:
        assert not running.mesh.fleet["off"].may_recover("big")
        response = await running.client.post("/api/chat", json={"model": "big", **BODIES["/api/chat"]})
        assert response.status_code == 404


async def test_a_node_that_was_never_reached_may_have_the_model() -> None:
    """Nobody knows yet which models it has. So nobody can say that no node has this one."""
    a = Ollama(("small:latest",))
    async with serve(a.answer) as dead:
        dead_url = dead.url
    async with serve(a.answer) as server, serve_nodes((node("a", server.url), node("never", dead_url))) as running:
        await wait_until(lambda: running.mesh.snapshot().node("never").tunnel.state == "backoff", "it was tried")
        response = await running.client.post("/api/chat", json={"model": "big", **BODIES["/api/chat"]})
        assert response.status_code == 503
        assert "never could not be asked for it yet" in response.text


@pytest.mark.parametrize("model", ["big", "alias"])
async def test_the_entry_of_a_model_of_a_node_that_is_away_is_not_missing(model: str) -> None:
    """Of a model without aliases any node is asked, of one with aliases all nodes."""
    rules = (ModelSpec("big:latest", aliases=("alias",)),) if model == "alias" else ()
    async with serve_fleet(*rules) as fleet:
        fleet.running.mesh.drain("a")
        response = await fleet.running.client.get(f"/v1/models/{model}")
        assert (response.status_code, "Retry-After" in response.headers) == (503, True)
        response = await fleet.running.client.get("/v1/models/nowhere")
        assert response.status_code == 404
