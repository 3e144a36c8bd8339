"""Models that a node cannot load, or lists and does not have: only they leave the node, and people are told why."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from gpumesh.backends.base import HttpCall
from gpumesh.balancer import breaker
from gpumesh.balancer.base import Demand
from gpumesh.balancer.outcomes import Outcome
from gpumesh.errors import ModelMissing, NoNodeError
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.state import NodeState
from gpumesh.topology import BackendKind
from tests.mesh.meshes import JSON, RunningMesh, mesh_of_nodes, node
from tests.mesh.servers import Exchange, serve, whole_response

TOO_LARGE = (500, "model requires more system memory (7.5 GiB) than is available (5.2 GiB)")
RUNNER_DIED = (500, "llama runner process has terminated: cudaMalloc failed: out of memory")
STOPPED = (500, "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error")
GONE = (404, "model 'big:latest' not found")
MODELS = ("big:latest", "small:latest", "third:latest", "fourth:latest")


@dataclass
class Ollama:
    """An Ollama with MODELS in its store. ``errors``: for a model, the status and message of all its answers.
    ``modified``: by model, when it was pulled. ``asked`` are the models of the requests for answers, in order."""

    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    modified: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def answer(self, exchange: Exchange) -> None:
        path = exchange.head.split(b" ", 2)[1]
        documents = {
            b"/api/version": {"version": "0.12.6"},
            b"/api/tags": {"models": [{"name": name, "modified_at": self.modified.get(name, "1")} for name in MODELS]},
            b"/api/ps": {"models": [{"name": name} for name in self.loaded]},
        }
        status, document = 200, documents.get(path)
        if document is None:
            model = json.loads(exchange.body)["model"]
            self.asked.append(model)
            document = {"message": {"role": "assistant", "content": "y"}, "done": True}
            if model in self.errors:
                status, message = self.errors[model]
                document = {"error": message}
        await exchange.send(whole_response(json.dumps(document).encode(), status=f"{status} X"))


@dataclass
class Fleet:
    servers: dict[str, Ollama]
    running: RunningMesh

    async def ask(self, model: str, *, stream: bool = False) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "?"}], "stream": stream}
        call = HttpCall("POST", "/api/chat", json.dumps(body).encode(), JSON)
        return await self.running.mesh.send(Demand(model=model), dict.fromkeys(BackendKind, call), timeout_s=20.0)

    async def node_of(self, model: str) -> tuple[str, int]:
        """The node that serves a request for the model, and the number of attempts that it takes."""
        answer = await self.ask(model)
        assert answer.status == 200
        await answer.read()
        return answer.node, answer.attempts

    async def state(self, name: str) -> NodeState:
        """The state of the node after a new probe."""
        await self.running.mesh.fleet[name].refresh()
        return self.running.mesh.snapshot().node(name)

    async def findings(self, name: str) -> list[str]:
        """The codes of the findings about the node's models after a new probe."""
        await self.running.mesh.fleet[name].refresh()
        findings = self.running.mesh.snapshot().findings
        return [found.code for found in findings if found.node == name and found.code.startswith("model-")]


@asynccontextmanager
async def fleet_of(*names: str) -> AsyncIterator[Fleet]:
    """A mesh of such servers; a node is preferred to those after it."""
    async with AsyncExitStack() as stack:
        servers = {name: Ollama() for name in names}
        nodes = []
        for index, (name, server) in enumerate(servers.items()):
            scripted = await stack.enter_async_context(serve(server.answer))
            nodes.append(node(name, scripted.url, weight=0.01**index))
        running = await stack.enter_async_context(mesh_of_nodes(*nodes))
        yield Fleet(servers, running)


# -- a model that cannot be loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TOO_LARGE, RUNNER_DIED, (507, "no"), (503, "insufficient memory - required")])
async def test_a_model_that_cannot_be_loaded_leaves_its_node_alone(error: tuple[int, str]) -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].errors["big"] = error
        assert await fleet.node_of("big") == ("b", 2)
        assert await fleet.node_of("big") == ("b", 1), "it is not asked there again"
        assert await fleet.node_of("BIG:latest") == ("b", 1), "whatever the client's spelling"
        assert await fleet.node_of("small") == ("a", 1), "the node serves its other models"
        state = await fleet.state("a")
        (broken,) = state.broken_models
        assert (broken.name, broken.why, broken.error) == ("big:latest", "model-load", error[1])
        assert broken.retry_in_s is not None
        assert state.load.failed == 1
        assert await fleet.findings("a") == ["model-unloadable"]
        assert await fleet.findings("b") == []


async def test_a_model_that_fits_only_one_of_many_nodes_finds_it() -> None:
    """It is no request that breaks servers: otherwise no third node would be asked."""
    async with fleet_of("a", "b", "c", "d") as fleet:
        for name in "abc":
            fleet.servers[name].errors["big"] = TOO_LARGE
        assert await fleet.node_of("big") == ("d", 4)
        assert await fleet.node_of("big") == ("d", 1)


async def test_it_is_tried_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "MODEL_PACE", breaker.BreakerPace(3, 0.01, 0.05))
    async with fleet_of("a") as fleet:
        fleet.servers["a"].errors["big"] = TOO_LARGE
        for _ in range(2):
            answer = await fleet.ask("big")
            assert isinstance(answer, WholeAnswer)
            assert (answer.status, json.loads(answer.body)["error"]) == TOO_LARGE, "the client gets the server's error"
        assert await fleet.findings("a") == ["model-unloadable"]
        fleet.servers["a"].errors.clear()
        assert await fleet.node_of("big") == ("a", 1), "it waits for the pause, and is the trial"
        assert await fleet.findings("a") == []
        assert (await fleet.state("a")).broken_models == ()


async def test_without_another_node_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "MODEL_PACE", breaker.BreakerPace(3, 60.0, 300.0))
    async with fleet_of("a") as fleet:
        fleet.servers["a"].errors["big"] = TOO_LARGE
        assert (await fleet.ask("big")).status == 500
        with pytest.raises(NoNodeError, match=r"'big' cannot be used now .*a: cannot load big:latest: model requires"):
            await fleet.ask("big")
        assert await fleet.node_of("small") == ("a", 1)


async def test_a_changed_list_of_models_ends_it() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].errors["big"] = TOO_LARGE
        assert await fleet.node_of("big") == ("b", 2)
        fleet.servers["a"].errors.clear()
        fleet.servers["a"].modified["big:latest"] = "2"
        assert await fleet.findings("a") == []
        assert await fleet.node_of("big") == ("a", 1)


async def test_500_without_a_reason_before_a_model_was_in_memory_is_about_the_model() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].errors["big"] = STOPPED
        assert [await fleet.node_of("big") for _ in range(4)] == [("b", 2)] * 3 + [("b", 1)]
        assert await fleet.node_of("small") == ("a", 1)
        assert fleet.running.mesh.fleet["a"].ledger.breaker == breaker.Breaker()
        (broken,) = (await fleet.state("a")).broken_models
        assert (broken.why, broken.error) == ("model", None), "a message for an unknown reason could quote a prompt"


async def test_500_with_the_model_in_memory_is_about_the_node() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].loaded.append("big:latest")
        fleet.servers["b"].loaded.extend(MODELS)  # no request waits for a load there, so the pause of ``a`` lasts
        for name in "ab":
            await fleet.state(name)
        fleet.servers["a"].errors["big"] = STOPPED
        assert [await fleet.node_of("big") for _ in range(3)] == [("b", 2)] * 3
        assert await fleet.node_of("small") == ("b", 1), "the node's breaker is open"
        assert (await fleet.state("a")).broken_models == ()


async def test_when_three_models_cannot_be_loaded_the_node_is_broken() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["b"].loaded.extend(MODELS)  # no request waits for a load there, so the pause of ``a`` lasts
        await fleet.state("b")
        fleet.servers["a"].errors.update(dict.fromkeys(("big", "small", "third"), TOO_LARGE))
        for model in ("big", "small", "third"):
            assert await fleet.node_of(model) == ("b", 2)
        assert await fleet.node_of("fourth") == ("b", 1), "a model that the node has not failed at"
        assert fleet.servers["a"].asked == ["big", "small", "third"]


async def test_two_servers_that_fail_for_an_unknown_reason_are_forgiven() -> None:
    """It may be the request that makes them fail, so the model stays where it is."""
    async with fleet_of("a", "b", "c") as fleet:
        for name in "abc":
            fleet.servers[name].errors["big"] = STOPPED
        for _ in range(5):
            answer = await fleet.ask("big")
            assert (answer.status, answer.attempts) == (500, 2), "no third is asked"
        assert (await fleet.state("a")).broken_models == ()
        fleet.servers["a"].errors.clear()
        assert await fleet.node_of("big") == ("a", 1)


# -- a model that is listed and not there ----------------------------------------------------------------------------


async def test_a_listed_model_that_is_not_there_is_asked_for_only_after_the_list_has_changed() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].errors["big"] = GONE
        assert await fleet.node_of("big") == ("b", 2)
        assert await fleet.node_of("big") == ("b", 1)
        assert await fleet.node_of("small") == ("a", 1)
        assert await fleet.findings("a") == ["model-listed-missing"]
        state = await fleet.state("a")
        assert [(broken.name, broken.why) for broken in state.broken_models] == [("big:latest", "missing-model")]
        assert state.load.failed == 1, "it was asked, and another node had to answer"
        fleet.servers["a"].errors.clear()
        assert await fleet.node_of("big") == ("b", 1), "the list is as before"
        fleet.servers["a"].modified["big:latest"] = "2"
        assert await fleet.findings("a") == []
        assert await fleet.node_of("big") == ("a", 1)


async def test_without_another_node_the_client_gets_404_each_time() -> None:
    async with fleet_of("a") as fleet:
        fleet.servers["a"].errors["big"] = GONE
        answer = await fleet.ask("big")
        assert isinstance(answer, WholeAnswer)
        assert (answer.status, json.loads(answer.body)["error"]) == GONE
        with pytest.raises(ModelMissing) as raised:
            await fleet.ask("big")
        assert "a lists it" in (raised.value.hint or "")
        assert fleet.servers["a"].asked == ["big"]


async def test_a_404_about_the_route_takes_no_model_away() -> None:
    async with fleet_of("a", "b") as fleet:
        fleet.servers["a"].errors["big"] = (404, "404 page not found")
        assert [await fleet.node_of("big") for _ in range(2)] == [("b", 2)] * 2
        assert await fleet.findings("a") == []
        assert fleet.running.attempts("a") == {Outcome.MODEL_NOT_FOUND: 2}


async def test_requests_to_the_model_store_still_reach_the_node() -> None:
    """They need no inference; one of them may be what repairs the model."""
    async with fleet_of("a") as fleet:
        fleet.servers["a"].errors["big"] = GONE
        assert (await fleet.ask("big")).status == 404
        fleet.servers["a"].errors.clear()
        call = HttpCall("POST", "/api/show", b'{"model":"big"}', JSON)
        demand = Demand(model="big", needs_slot=False)
        answer = await fleet.running.mesh.send(demand, dict.fromkeys(BackendKind, call), timeout_s=5.0)
        assert (answer.status, answer.node) == (200, "a")
        assert (await fleet.state("a")).broken_models, "it does not show that the model can be used"
