"""GETs and recordings that name their model in the query; forms and such requests with aliases and limited keys."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gpumesh.topology import BackendKind, GatewaySpec, KeySpec, ModelSpec
from tests.gateway.fleet import RunningGateway, node, serve_nodes
from tests.mesh.servers import Exchange, serve, whole_response

WAV = b"RIFF\x00\xff\r\n--no boundary"
AUDIO = "/v1/audio/transcriptions"
LIMITED = {"Authorization": "Bearer limited"}
FULL = {"Authorization": "Bearer full"}
KEYS = tuple(
    KeySpec(name, sha256=hashlib.sha256(name.encode()).hexdigest(), models=models)
    for name, models in (("full", None), ("limited", ("ears",)))
)
ALIASES = (ModelSpec("ears", aliases=("whisper-1", "Org/Whisper")),)


class Recorder:
    """A server with these models, which has every route."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.targets: list[str] = []
        self.bodies: list[bytes] = []

    async def __call__(self, exchange: Exchange) -> None:
        method, target, _ = exchange.head.split(b" ", 2)
        if target == b"/v1/models":
            entries = ",".join(f'{{"id": "{name}"}}' for name in self.models)
            await exchange.send(whole_response(f'{{"data": [{entries}]}}'.encode()))
        elif method == b"GET" and b"?" not in target:
            await exchange.send(whole_response(b"{}", status="404 Not Found"))
        else:
            self.targets.append(target.decode())
            self.bodies.append(exchange.body)
            await exchange.send(whole_response(b'{"text": "hello"}'))


@asynccontextmanager
async def serve_recorders(
    *servers: Recorder, models: tuple[ModelSpec, ...] = (), keys: tuple[KeySpec, ...] = ()
) -> AsyncIterator[RunningGateway]:
    async with AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(serve(server))).url for server in servers]
        nodes = tuple(node(name, url, kind=BackendKind.OPENAI) for name, url in zip("ab", urls, strict=False))
        spec = GatewaySpec(default_model="Org/Whisper", keys=keys)
        yield await stack.enter_async_context(serve_nodes(nodes, spec=spec, models=models))


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("GET", "/v1/audio/voices?model=Org%2FWhisper&x=1", ""),
        ("GET", "/api/v0/info?a&model=Org/Whisper", ""),
        ("POST", f"{AUDIO}?model=Org/Whisper", "audio/wav"),
        ("POST", f"{AUDIO}?model=Org/Whisper", "application/x-www-form-urlencoded"),
        ("POST", "/v1/listen?model=Org/Whisper", "audio/wav"),
        ("POST", AUDIO, "audio/wav"),
    ],
)
async def test_the_query_names_the_model(method: str, target: str, kind: str) -> None:
    """Byte by byte, query included. A recording that names none is for the default model."""
    whisper, other = Recorder("Org/Whisper"), Recorder("other")
    async with serve_recorders(other, whisper) as fleet:
        content = WAV if method == "POST" else b""
        answer = await fleet.client.request(method, target, content=content, headers={"Content-Type": kind})
        assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "b")
        assert (whisper.targets, whisper.bodies) == ([target], [content])
        assert not other.targets


@pytest.mark.parametrize("spelling", ["whisper-1", "WHISPER-1", "ears", "org/whisper"])
@pytest.mark.parametrize("target", ["/v1/audio/voices?b=2&model={}", "/v1/listen?model={}&b=2"])
async def test_the_server_gets_its_own_name_of_the_model_in_the_query(target: str, spelling: str) -> None:
    whisper = Recorder("Org/Whisper")
    async with serve_recorders(whisper, models=ALIASES) as fleet:
        method = "GET" if "voices" in target else "POST"
        answer = await fleet.client.request(
            method,
            target.format(spelling),
            content=WAV if method == "POST" else b"",
            headers={"Content-Type": "audio/x"},
        )
        assert answer.status_code == 200
        assert whisper.targets == [target.format("Org%2FWhisper" if spelling != "Org/Whisper" else spelling)]


async def test_a_fallback_is_named_in_the_query() -> None:
    class Busy(Recorder):
        async def __call__(self, exchange: Exchange) -> None:
            if exchange.head.startswith(b"POST "):
                await exchange.send(whole_response(b"{}", status="503 Busy"))
            else:
                await super().__call__(exchange)

    small = Recorder("small")
    async with serve_recorders(Busy("large"), small, models=(ModelSpec("large", fallback="small"),)) as fleet:
        answer = await fleet.client.post("/v1/listen?model=large", content=WAV, headers={"Content-Type": "audio/wav"})
        assert (answer.status_code, answer.headers["X-GPUMesh-Model"]) == (200, "small")
        assert small.targets == ["/v1/listen?model=small"]


@pytest.mark.parametrize(
    ("method", "target", "content", "status"),
    [
        ("GET", "/v1/audio/voices?model=nobody", b"", 404),
        ("GET", "/v1/audio/voices?model=", b"", 404),
        ("GET", "/v1/audio/voices?model=Org/Whisper&model=other", b"", 400),
        ("GET", "/slots?model=Org/Whisper", b"", 404),
        ("GET", "/v1/audio/voices?name=model", b"", 404),
        ("DELETE", "/v1/audio/voices?model=Org/Whisper", b"", 404),
        ("POST", "/v1/listen", WAV, 404),
        ("POST", "/v1/embeddings?model=Org/Whisper", WAV, 400),
        ("POST", "/v1/chat/completions?model=Org/Whisper", WAV, 400),
    ],
)
async def test_other_queries_go_nowhere(method: str, target: str, content: bytes, status: int) -> None:
    whisper = Recorder("Org/Whisper")
    async with serve_recorders(whisper) as fleet:
        answer = await fleet.client.request(method, target, content=content, headers={"Content-Type": "audio/wav"})
        assert answer.status_code == status, answer.text
        assert not whisper.targets


async def test_an_empty_answer_may_be_all_that_was_asked_for() -> None:
    """Of a route of which nothing is known. It is not executed on one node after the other."""

    class Silent(Recorder):
        async def __call__(self, exchange: Exchange) -> None:
            if exchange.head.startswith(b"POST "):
                self.targets.append("")
                await exchange.send(b"HTTP/1.1 204 No Content\r\n\r\n")
            else:
                await super().__call__(exchange)

    first, second = Silent("Org/Whisper"), Silent("Org/Whisper")
    async with serve_recorders(first, second) as fleet:
        answer = await fleet.client.post("/v1/responses/cancel", json={"model": "Org/Whisper"})
        assert (answer.status_code, answer.content) == (204, b"")
        assert len(first.targets + second.targets) == 1


# -- limited keys ----------------------------------------------------------------------------------------------------


def asked(spelling: str, way: str) -> dict[str, Any]:
    """A request for a model of this name."""
    match way:
        case "form":
            return {"url": AUDIO, "data": {"model": spelling}, "files": {"file": ("a.wav", WAV, "audio/wav")}}
        case "form of a route that is not known":
            return {**asked(spelling, "form"), "url": "/v1/audio/translations"}
        case "query":
            return {"url": f"{AUDIO}?model={spelling}", "content": WAV, "headers": {"Content-Type": "audio/wav"}}
    return {"url": way, "json": {"model": spelling, "input": "?"}}


WAYS = ["form", "form of a route that is not known", "query", "/v1/rerank", "/tokenize", "/v1/messages/count_tokens"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_limited_key_uses_its_models_under_any_name(way: str) -> None:
    whisper = Recorder("Org/Whisper", "other")
    async with serve_recorders(whisper, models=ALIASES, keys=KEYS) as fleet:
        for spelling in ("ears", "whisper-1", "ORG/whisper"):
            request = asked(spelling, way)
            headers = request.pop("headers", {})
            answer = await fleet.client.post(**request, headers={**headers, **LIMITED})
            assert answer.status_code == 200, answer.text
            assert b"Org/Whisper" in whisper.bodies[-1] or "model=Org%2FWhisper" in whisper.targets[-1]
        count = len(whisper.targets)
        request = asked("other", way)
        headers = request.pop("headers", {})
        answer = await fleet.client.post(**request, headers={**headers, **LIMITED})
        assert answer.status_code == 403
        assert "may not use model 'other'" in answer.text
        assert len(whisper.targets) == count
        answer = await fleet.client.post(**request, headers={**headers, **FULL})
        assert answer.status_code == 200


@pytest.mark.parametrize("target", ["/v1/load_lora_adapter", "/api/v1/models/unload", "/v1/anything"])
async def test_a_limited_key_makes_no_request_of_which_nothing_is_known(target: str) -> None:
    whisper = Recorder("Org/Whisper")
    async with serve_recorders(whisper, models=ALIASES, keys=KEYS) as fleet:
        answer = await fleet.client.post(target, json={"model": "ears"}, headers=LIMITED)
        assert answer.status_code == 403
        assert "does not know what this route does" in answer.text
        answer = await fleet.client.get("/v1/audio/voices?model=ears", headers=LIMITED)
        assert answer.status_code == 403
        assert not whisper.targets
        assert (await fleet.client.post(target, json={"model": "ears"}, headers=FULL)).status_code == 200


HIDING_PLACES = {
    "in the query, beside another in the body": ("/v1/rerank?model=other", {}, b'{"model": "ears"}'),
    "in the query of a known route": ("/v1/chat/completions?model=other", {}, b'{"model": "ears", "messages": []}'),
    "in the second of two members": ("/v1/rerank?model=ears", {}, b'{"model": "ears", "model": "other"}'),
    "in UTF-16": ("/v1/rerank?model=ears", {}, '{"model": "other"}'.encode("utf-16")),
    "in what is called a recording": (f"{AUDIO}?model=ears", {"Content-Type": "audio/wav"}, b' {"model": "other",}'),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
async def test_a_limited_key_hides_no_other_model(place: str) -> None:
    target, headers, body = HIDING_PLACES[place]
    whisper = Recorder("Org/Whisper", "other")
    async with serve_recorders(whisper, models=ALIASES, keys=KEYS) as fleet:
        answer = await fleet.client.post(target, content=body, headers={**headers, **LIMITED})
        assert answer.status_code == 403, answer.text
        assert not whisper.targets
