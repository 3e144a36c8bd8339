"""Errors as the clients of each API see them: a missing model, a mistake of the client, a failure of every node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.lab.profile import QWEN_7B, Faults
from tests.gateway.fleet import CHAT, MODEL, RunningGateway, quick_host, serve_hosts

# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/api/chat", "nobody:1b"),
        ("/api/generate", "nobody:1b"),
        ("/api/embed", "nobody:1b"),
        ("/api/show", "nobody:1b"),
        ("/v1/chat/completions", "nobody:1b"),
        ("/v1/messages", "nobody:1b"),
    ],
)
async def test_a_model_that_no_node_has(fleet: RunningGateway, path: str, model: str) -> None:
    answer = await fleet.client.post(path, json={**CHAT, "model": model, "max_tokens": 5})
    assert answer.status_code == 404
    error = answer.json()["error"]
    if path.startswith("/api/"):
        message = error
    else:
        assert error["type"] == "not_found_error"
        message = error["message"]
    if path == "/v1/messages":
        assert answer.json()["type"] == "error"
    assert message.startswith("model 'nobody:1b' not found")
    assert "could be pulled to a, b" in message
    assert MODEL in message


async def test_the_404_of_a_large_fleet_is_short() -> None:
    """A program looks for the first words; the names of all models and nodes are for people."""
    models = tuple(replace(QWEN_7B, name=f"model-{number}:7b") for number in range(40))
    hosts = (quick_host(name, models=models) for name in "abcde")
    async with serve_hosts(*hosts) as fleet:
        answer = await fleet.client.post("/v1/chat/completions", json={**CHAT, "model": "nobody:1b"})
        message = answer.json()["error"]["message"]
        assert message.startswith("model 'nobody:1b' not found; ")
        assert message.count("model-") == 3
        assert "pulled to a, b, c …" in message
        assert len(message) < 250


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/api/chat", b"", 400, "missing request body"),
        ("POST", "/api/chat", b"{", 400, "not JSON"),
        ("POST", "/api/chat", b"[1]", 400, "not a JSON object"),
        ("POST", "/api/generate", b"{}", 400, "model is required"),
        ("POST", "/v1/chat/completions", b"{}", 400, "model is required"),
        ("POST", "/v1/messages", b"nonsense", 400, "not JSON"),
        ("POST", "/api/pull", b"{}", 400, "model is required"),
        ("DELETE", "/api/delete", b'{"model": 3}', 400, "model is required"),
        ("GET", "/api/nothing", b"", 404, "there is no /api/nothing here"),
        ("GET", "/v1/nothing", b"", 404, "there is no /v1/nothing here"),
        ("PROPFIND", "/", b"", 405, "not allowed"),
    ],
)
async def test_mistakes_of_the_client_are_refused(
    fleet: RunningGateway, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    answer = await fleet.client.request(method, path, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in (error if path.startswith("/api/") or path == "/" else error["message"])
    assert fleet.hosts["a"].counters.started == 0


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/chat", "POST"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/api/delete", "DELETE"),
        ("GET", "/api/blobs/sha256:1", "HEAD, POST"),
    ],
)
async def test_a_wrong_method_is_answered_with_the_allowed_ones(
    fleet: RunningGateway, method: str, path: str, allow: str
) -> None:
    answer = await fleet.client.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allow)


async def test_the_error_message_of_a_server_reaches_the_client(fleet: RunningGateway) -> None:
    refused = await fleet.chat(think=True)
    assert refused.status_code == 400
    assert refused.json() == {"error": f'"{MODEL}" does not support thinking'}
    assert refused.headers["X-GPUMesh-Attempts"] == "1", "the client's mistake is no reason to ask others"


async def test_when_every_node_fails_the_client_gets_the_servers_error(fleet: RunningGateway) -> None:
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=500, paths=("/api/chat", "/v1/chat")))
    native = await fleet.chat()
    assert native.status_code == 500
    assert "model runner has unexpectedly stopped" in native.json()["error"]
    openai = await fleet.client.post("/v1/chat/completions", json=CHAT)
    assert openai.json()["error"]["type"] == "api_error"
