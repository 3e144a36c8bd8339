"""Which kind of server answers, found by asking: in how many requests, and what happens when the server changes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.servers.server import SimServer
from gpumesh.lab.vllm import SimVllm
from gpumesh.probes.backend import BackendReport, probe_backend
from gpumesh.probes.server_kind import KnownKinds
from gpumesh.state import BackendPhase
from gpumesh.topology import BackendKind, BackendSpec, Target
from tests.http_clients import loopback_client
from tests.mesh.servers import Exchange, serve, whole_response

PATIENCE_S = 20.0
AUTO = BackendSpec(targets=(Target("127.0.0.1", 11434),))
HOST = profile.make_instant_host("one")
LLAMA_MODELS = {"data": [{"id": "tiny", "owned_by": "llamacpp"}]}
LLAMA_PROPS = {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 2}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with loopback_client(timeout=PATIENCE_S) as made:
        yield made


async def probe(
    client: httpx.AsyncClient, *urls: str, known: KnownKinds | None = None, key: str | None = None
) -> BackendReport:
    targets = tuple(Target("127.0.0.1", 11434 + number) for number in range(len(urls)))
    return await probe_backend(
        client, BackendSpec(targets=targets), urls, api_key=key, timeout_s=PATIENCE_S, node="one", known_kinds=known
    )


class Answers:
    """A server of scripted answers by path, 404 for all others; ``asked`` are the paths in their order."""

    def __init__(self, answers: Mapping[str, Any], status: str = "200 OK") -> None:
        self.answers = dict(answers)
        self.status = status
        self.asked: list[str] = []

    async def __call__(self, exchange: Exchange) -> None:
        path = exchange.head.split(b" ")[1].decode()
        self.asked.append(path)
        if path in self.answers:
            await exchange.send(whole_response(json.dumps(self.answers[path]).encode(), status=self.status))
        else:
            await exchange.send(whole_response(b'{"error":{"message":"File Not Found"}}', status="404 Not Found"))


LLAMA = {"/v1/models": LLAMA_MODELS, "/props": LLAMA_PROPS, "/health": {"status": "ok"}}
VLLM = {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}, "/version": {"version": "0.11.0"}}
OLLAMA = {"/api/version": {"version": "0.12.6"}, "/api/tags": {"models": [{"name": "m"}]}, "/api/ps": {"models": []}}
OTHER = {"/v1/models": {"data": [{"id": "m", "owned_by": "organization_owner"}]}}


@pytest.mark.parametrize(
    ("answers", "kind", "identifying"),
    [
        (OLLAMA, "ollama", ["/api/version"]),
        (LLAMA, "llamacpp", ["/api/version", "/v1/models"]),
        (VLLM, "vllm", ["/api/version", "/v1/models"]),
        (OTHER, "openai", ["/api/version", "/v1/models"]),
    ],
)
async def test_each_kind_is_found_in_two_requests_at_most(
    client: httpx.AsyncClient, answers: dict[str, Any], kind: str, identifying: list[str]
) -> None:
    script, known = Answers(answers), KnownKinds()
    async with serve(script) as server:
        report = await probe(client, server.url, known=known)
        assert (report.state.state, report.state.kind) == (BackendPhase.UP, kind)
        assert script.asked[: len(identifying)] == identifying
        assert len(script.asked) == len(set(script.asked)), "nothing is asked twice"
        script.asked.clear()
        assert (await probe(client, server.url, known=known)).state.kind == kind
    assert ("/api/version" in script.asked) == (kind in ("ollama", "openai")), "what it has said is remembered"


async def test_the_stand_ins_are_recognized(client: httpx.AsyncClient) -> None:
    async with AsyncExitStack() as stack:
        servers: dict[str, SimServer] = {"ollama": SimOllama(HOST), "vllm": SimVllm(HOST)}
        for kind, server in servers.items():
            await stack.enter_async_context(server)
            report = await probe(client, server.url)
            assert (report.state.kind, report.state.models) == (kind, ("qwen2.5:7b",))


async def test_another_kind_of_server_on_the_same_port_is_noticed(client: httpx.AsyncClient) -> None:
    script, known = Answers(OLLAMA), KnownKinds()
    async with serve(script) as server:
        for answers, kind in (
            (OLLAMA, "ollama"),
            (LLAMA, "llamacpp"),
            (VLLM, "vllm"),
            (OTHER, "openai"),
            (VLLM, "vllm"),
            (LLAMA, "llamacpp"),
            (OTHER, "openai"),
            (OLLAMA, "ollama"),
            (VLLM, "vllm"),
        ):
            script.answers = dict(answers)
            report = await probe(client, server.url, known=known)
            assert (report.state.state, report.state.kind) == (BackendPhase.UP, kind), report.state.last_error


async def test_while_it_does_not_answer_its_last_kind_is_shown(client: httpx.AsyncClient) -> None:
    script, known = Answers(VLLM), KnownKinds()
    async with serve(script) as server:
        await probe(client, server.url, known=known)
    report = await probe(client, server.url, known=known)
    assert (report.state.state, report.state.kind, report.state.error_code) == (
        BackendPhase.DOWN,
        "vllm",
        "backend-down",
    )


async def test_before_it_has_answered_its_kind_is_not_known(client: httpx.AsyncClient) -> None:
    async with serve(Answers(OTHER)) as server:
        pass
    report = await probe(client, server.url)
    assert (report.state.state, report.state.kind) == (BackendPhase.DOWN, "auto")


async def test_a_llama_server_that_loads_is_told_as_such(client: httpx.AsyncClient) -> None:
    paths = ("/api/version", "/v1/models", "/props", "/health", "/slots", "/metrics")
    async with serve(Answers(dict.fromkeys(paths, LOADING), status="503 Service Unavailable")) as server:
        report = await probe(client, server.url)
    (finding,) = report.findings
    assert (finding.code, "Loading model" in finding.message) == ("backend-down", True)
    assert "wait until it has loaded" in (finding.hint or "")


async def test_a_key_that_is_missing_and_one_that_opens(client: httpx.AsyncClient) -> None:
    async with SimVllm(HOST, api_key="k") as server:
        report = await probe(client, server.url)
        assert [finding.code for finding in report.findings] == ["key-refused"]
        assert (await probe(client, server.url, key="k")).state.kind == "vllm"


async def test_a_server_that_is_none(client: httpx.AsyncClient) -> None:
    async with serve(Answers({})) as server:
        (finding,) = (await probe(client, server.url)).findings
    assert finding.code == "wrong-server"
    assert "not as an inference server: /v1/models gave HTTP 404" in finding.message
    assert "11434 for Ollama, 8080 for llama-server, 8000 for vLLM" in (finding.hint or "")


async def test_candidates_may_be_of_several_kinds(client: httpx.AsyncClient) -> None:
    known = KnownKinds()
    async with serve(Answers(LLAMA)) as second, SimOllama(HOST) as first:
        assert (await probe(client, first.url, second.url, known=known)).state.kind == "ollama"
        await first.set_faults(profile.Faults(status=500))
        report = await probe(client, first.url, second.url, known=known)
        assert (report.url, report.state.kind) == (second.url, "llamacpp")


@pytest.mark.parametrize("kind", [BackendKind.LLAMACPP, BackendKind.VLLM])
async def test_a_kind_in_mesh_yaml_is_not_taken_for_another(client: httpx.AsyncClient, kind: BackendKind) -> None:
    async with serve(Answers(OTHER)) as server:
        spec = BackendSpec(kind, AUTO.targets)
        report = await probe_backend(client, spec, (server.url,), api_key=None, timeout_s=PATIENCE_S, node="one")
    (finding,) = report.findings
    assert (finding.code, "leave out `backend.kind`" in (finding.hint or "")) == ("wrong-server", True)
