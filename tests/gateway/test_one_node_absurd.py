"""One node answers absurd values: lists and figures over all nodes still hold for the others.

Over real HTTP, with a server whose answers hypothesis generates, and an honest server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from prometheus_client.parser import text_string_to_metric_families

from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import LLAMA_8B, QWEN_7B
from gpumesh.text import versions
from gpumesh.topology import BackendKind
from gpumesh.wire import status_from_json
from tests.absurd_answers import DEEPER, Raw, json_bytes, make_model_entries, ollama_answers, openai_answers
from tests.gateway.fleet import RunningGateway, node, quick_host, serve_nodes
from tests.mesh.servers import Exchange, serve, whole_response
from tests.status_schema import check_status_document

HONEST = quick_host("honest", models=(QWEN_7B, LLAMA_8B), version="0.12.6")
NAMES = {QWEN_7B.name, LLAMA_8B.name}
MAX_DURATION_S = 5.0  # generous: two cores, shared
MOST_BYTES = 4 << 20
# Not shrunk: each example is a dozen requests.
EXAMPLES = settings(
    max_examples=40,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Hostile:
    """Answers each path with its entry in ``answers``, and other paths with ``{}``."""

    answers: Mapping[str, bytes] = field(default_factory=dict)

    async def __call__(self, exchange: Exchange) -> None:
        method, target = exchange.head.split(b" ")[:2]
        body = self.answers.get(target.decode("latin-1"), b"{}")
        if method == b"HEAD":
            await exchange.send(b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 0\r\n\r\n")
        else:
            await exchange.send(whole_response(body))


@dataclass
class Fleet:
    """Runs on one event loop as long as the module's tests: an example costs a few requests, and no start."""

    runner: asyncio.Runner
    running: RunningGateway
    hostile: Hostile

    def check(self, answers: Mapping[str, Any]) -> None:
        self.hostile.answers = {path: json_bytes(document) for path, document in answers.items()}
        self.runner.run(self._check())

    async def _check(self) -> None:
        await self.running.mesh.refresh(["hostile"])
        began = time.monotonic()
        await everything_holds(self.running)
        assert time.monotonic() - began < MAX_DURATION_S


def fleet_of(kind: BackendKind) -> Iterator[Fleet]:
    with asyncio.Runner() as runner:
        stack, hostile = AsyncExitStack(), Hostile()

        async def start() -> RunningGateway:
            host = await stack.enter_async_context(SimOllama(HONEST))
            server = await stack.enter_async_context(serve(hostile))
            nodes = (node("hostile", server.url, kind=kind), node("honest", host.url))
            return await stack.enter_async_context(serve_nodes(nodes, {"honest": host}))

        fleet = Fleet(runner, runner.run(start()), hostile)
        try:
            yield fleet
        finally:
            runner.run(stack.aclose())


@pytest.fixture(scope="module")
def ollama() -> Iterator[Fleet]:
    yield from fleet_of(BackendKind.OLLAMA)


@pytest.fixture(scope="module")
def openai() -> Iterator[Fleet]:
    yield from fleet_of(BackendKind.OPENAI)


# -- what must hold --------------------------------------------------------------------------------------------------


def strict(answer: httpx.Response) -> Any:
    """A document that every client can read."""
    assert answer.status_code == 200, (answer.request.url.path, answer.text[:200])
    assert len(answer.content) < MOST_BYTES

    def refuse(text: str) -> None:
        raise AssertionError(f"{answer.request.url.path} holds {text}")

    document = json.loads(answer.content, parse_constant=refuse)
    json.dumps(document, ensure_ascii=False, allow_nan=False).encode()  # half of a surrogate pair would raise
    assert all(-(2**63) <= number < 2**63 for number in wholes(document))
    return document


def wholes(value: Any) -> Iterator[int]:
    match value:
        case dict():
            for part in value.values():
                yield from wholes(part)
        case list():
            for part in value:
                yield from wholes(part)
        case int():
            yield value


def as_ollamas_client(entries: list[dict[str, Any]]) -> None:
    """Whether Go's encoding/json can read it as api.ListModelResponse or api.ProcessModelResponse."""
    texts, wholes = ("name", "model", "digest", "remote_model", "remote_host"), ("size", "size_vram", "context_length")
    for entry in entries:
        assert all(isinstance(entry[key], str) for key in texts if key in entry)
        assert all(type(entry[key]) is int for key in wholes if key in entry)
        for key in ("modified_at", "expires_at"):
            if key in entry:
                assert len(entry[key]) >= len("2026-01-01T00:00:00Z")
                assert entry[key][10] == "T"
                datetime.fromisoformat(entry[key])
        details = entry.get("details", {})
        assert all(isinstance(details[key], str) for key in ("family", "parameter_size") if key in details)
        families = details.get("families") or []
        assert isinstance(families, list)
        assert all(isinstance(family, str) for family in families)


async def everything_holds(fleet: RunningGateway) -> None:
    client = fleet.client
    version = strict(await client.get("/api/version"))["version"]
    theirs = fleet.mesh.snapshot().node("hostile").backend.version
    assert version == versions.oldest_version(filter(None, (theirs, HONEST.version)))
    tags = strict(await client.get("/api/tags"))["models"]
    as_ollamas_client(tags)
    assert {name.lower() for name in NAMES} <= {entry["name"].lower() for entry in tags}
    as_ollamas_client(strict(await client.get("/api/ps"))["models"])
    models = strict(await client.get("/v1/models"))["data"]
    assert {entry["id"] for entry in models} >= NAMES
    status = strict(await client.get("/mesh/status"))
    check_status_document(status)
    state = status_from_json(status)
    assert set(state.node("honest").backend.models) == NAMES
    await metrics_hold(client)
    async with client.stream("GET", "/mesh/events") as events:
        lines = events.aiter_lines()
        while True:
            line = await anext(lines)
            if line.startswith("data: "):
                json.loads(line.removeprefix("data: "), parse_constant=pytest.fail)
            if line.startswith('data: {"schema"'):
                break
    show = await client.post("/api/show", json={"model": LLAMA_8B.name}, headers={"X-GPUMesh-Node": "honest"})
    assert strict(show)["details"]
    assert (await fleet.chat(model=LLAMA_8B.name, headers={"X-GPUMesh-Node": "honest"})).status_code == 200
    missing = await fleet.chat(model="made-up:1b")
    assert (missing.status_code, len(missing.content) < 1 << 16) == (404, True)


async def metrics_hold(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert len(answer.content) < 1 << 18
    seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            assert series not in seen
            seen.add(series)


# -- whatever the other node answers -------------------------------------------------------------------------------

VERSION = {"/api/version": {"version": "0.12.6"}}


def tagged(**entry: Any) -> dict[str, Any]:
    """The answers of an Ollama whose lists have one entry with these keys."""
    return {
        **VERSION,
        "/api/tags": {"models": [entry]},
        "/api/ps": {"models": [entry]},
        "/v1/models": {"data": [entry]},
    }


@pytest.mark.parametrize("version", ["0.²", "²", "½.0", "٣.٤", "0." + "1" * 5000, "latest", "-1", "\ud800", ""])
def test_a_nonsensical_version_is_not_the_oldest(ollama: Fleet, version: str) -> None:
    ollama.check({"/api/version": {"version": version}, "/api/tags": {"models": []}})

    async def merged() -> Any:
        return (await ollama.running.client.get("/api/version")).json()

    assert ollama.runner.run(merged()) == {"version": HONEST.version}


@pytest.mark.slow
@pytest.mark.timeout(240)
@EXAMPLES
@given(ollama_answers(*NAMES))
@example({"/api/version": {"version": "0.²"}, "/api/tags": {"models": []}})
@example({"/api/version": {"version": "²"}, "/api/tags": {"models": []}})
@example({"/api/version": {"version": "½.0"}, "/api/tags": {"models": []}})
@example(tagged(name="m", id="m", size=Raw("NaN")))
@example(tagged(name="m", id="m", size=Raw("1e999"), created=Raw("Infinity")))
@example(tagged(name="m", id="m", unknown=Raw("NaN")))
@example(tagged(name="\ud800", id="\ud800"))
@example(tagged(name="m", id="m", digest="\ud800", unknown={"\ud800": ["\udfff"]}))
@example(tagged(name="m", id="m", size="big", details=[1], modified_at=5))
@example(tagged(name="m", id="m", modified_at="yesterday", expires_at="99999-01-01T00:00:00Z"))
@example(tagged(name=QWEN_7B.name.upper(), id=QWEN_7B.name, modified_at="zzzz", expires_at="zzzz"))
@example(tagged(name="m", id="m", size=Raw("1" * 5000), size_vram=10**400))
@example(tagged(name="x" * 1_000_000, id="x" * 1_000_000))
@example(tagged(name="m", id="m", unknown=DEEPER))
@example(
    {**VERSION, "/api/tags": {"models": make_model_entries(9_000)}, "/api/ps": {"models": make_model_entries(9_000)}}
)
@example(
    {
        **VERSION,
        "/api/tags": {"models": make_model_entries(100_000)},
        "/v1/models": {"data": make_model_entries(100_000)},
    }
)
@example({**VERSION, "/api/tags": {"models": Raw("[" + "[]," * 1_000_000 + "[]]")}})
def test_absurd_answers_of_an_ollama_leave_the_other_node_usable(ollama: Fleet, answers: Mapping[str, Any]) -> None:
    ollama.check(answers)


@pytest.mark.slow
@pytest.mark.timeout(240)
@EXAMPLES
@given(openai_answers(*NAMES))
@example({"/v1/models": {"data": [{"id": "m", "owned_by": ["vllm"]}]}})
@example({"/v1/models": {"data": [{"id": "m", "owned_by": {}}]}, "/props": {"total_slots": 10**18}})
def test_absurd_answers_of_another_kind_leave_the_other_node_usable(openai: Fleet, answers: Mapping[str, Any]) -> None:
    openai.check(answers)


# -- questions that any node could answer ------------------------------------------------------------------------------

UNREADABLE = (b"", b"[]", b"<html>", b'{"a":NaN}', b'{"a":"\\ud800"}', b'{"a":"\xff"}', b'{"a":' * 3000, b'{"a":1')


@pytest.mark.parametrize("body", UNREADABLE)
async def test_an_unreadable_document_is_asked_of_another_node(body: bytes) -> None:
    model = QWEN_7B.name
    lists = {"/api/version": b'{"version":"0.12.6"}', "/api/tags": json_bytes({"models": [{"name": model}]})}
    asked = {"/api/show": body, f"/v1/models/{model}": body}
    async with SimOllama(HONEST) as host, serve(Hostile(lists | asked)) as server:
        nodes = (node("hostile", server.url), node("honest", host.url))
        async with serve_nodes(nodes, {"honest": host}) as fleet:
            for _ in range(4):  # whichever node is asked first
                show = await fleet.client.post("/api/show", json={"model": model})
                assert strict(show)["details"]
                assert show.headers["X-GPUMesh-Node"] == "honest"
                assert strict(await fleet.client.get(f"/v1/models/{model}"))["id"] == model
            named = await fleet.client.post("/api/show", json={"model": model}, headers={"X-GPUMesh-Node": "hostile"})
            assert (named.status_code, named.json()["error"]) == (502, "its answer is not the JSON that it should be")


async def test_an_endless_list_is_left_out_and_costs_no_memory() -> None:
    async def endless(exchange: Exchange) -> None:
        path = exchange.head.split(b" ")[1]
        if len(server.requests) <= 3:  # the first probe
            await exchange.send(whole_response(b'{"version":"0.12.6","models":[]}'))
            return
        if path != b"/api/tags":
            await exchange.send(whole_response(b"{}"))
            return
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n")
        while not exchange.writer.is_closing():
            await exchange.send(b" " * (1 << 20))
            sent.append(1 << 20)

    sent: list[int] = []
    async with SimOllama(HONEST) as host, serve(endless) as server:
        nodes = (node("hostile", server.url), node("honest", host.url))
        async with serve_nodes(nodes, {"honest": host}) as fleet:
            tags = strict(await fleet.client.get("/api/tags"))["models"]
            assert {entry["name"] for entry in tags} == NAMES
    assert sum(sent) < 64 << 20


FIGURES: tuple[dict[str, Any], ...] = (
    {"eval_count": 64_000_000, "eval_duration": 1_000_000_000},
    {"eval_count": 10**400, "eval_duration": -1, "total_duration": 1e308},
    {"eval_count": 100, "eval_duration": 1e-300, "total_duration": Raw("NaN"), "load_duration": Raw("Infinity")},
    {"eval_count": True, "eval_duration": [], "total_duration": {}, "prompt_eval_count": "5"},
    {"eval_count": 2**62, "prompt_eval_count": 2**62, "eval_duration": 2**62, "total_duration": 2**62},
)


@pytest.mark.parametrize("figures", FIGURES)
async def test_the_speed_that_a_server_reports_is_bounded(figures: dict[str, Any]) -> None:
    model = QWEN_7B.name
    frame = {"message": {"role": "assistant", "content": "hi"}, "done": True, "done_reason": "stop", **figures}
    lists = {"/api/version": b'{"version":"0.12.6"}', "/api/tags": json_bytes({"models": [{"name": model}]})}
    async with SimOllama(HONEST) as host, serve(Hostile({**lists, "/api/chat": json_bytes(frame)})) as server:
        nodes = (node("hostile", server.url), node("honest", host.url))
        async with serve_nodes(nodes, {"honest": host}) as fleet:
            for _ in range(5):
                assert (await fleet.chat(model=model, headers={"X-GPUMesh-Node": "hostile"})).status_code == 200
            for _ in range(5):
                assert (await fleet.chat(model=model, headers={"X-GPUMesh-Node": "honest"})).status_code == 200
            state = fleet.mesh.snapshot()
            assert 0 <= (state.node("hostile").backend.tokens_per_s or 0.0) < 10_000
            rates = fleet.mesh.fleet["hostile"].account.rates
            assert 0 < 1 / rates.decode_s(model, 1) <= 100_000
            assert 0 < 1 / rates.prefill_s(model, 1) <= 10_000_000
            assert 0 <= rates.load_s(model) <= 3600
            await everything_holds(fleet)
