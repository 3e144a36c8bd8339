"""The probe of a server, against the lab's stand-in and scripted servers: its report, and the choice of a candidate."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import httpx
import pytest

from gpumesh.audit.catalog import CATALOG
from gpumesh.backends.base import Inventory, ProbeAnswers
from gpumesh.backends.dialects import DIALECTS
from gpumesh.backends.ollama import OllamaDialect
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.state import BackendPhase, Severity
from gpumesh.topology import BackendKind
from tests.mesh.servers import (
    Exchange,
    ScriptedServer,
    answer_with,
    serve,
    whole_response,
)
from tests.probes.probed_servers import OPENAI, PATIENCE_S, json_response, probe, request_header, request_path

# -- servers that are right ------------------------------------------------------------------------------------------


async def test_the_report_of_an_ollama(client: httpx.AsyncClient) -> None:
    models = (profile.QWEN_7B, profile.EMBEDDER)
    async with SimOllama(profile.make_host("iceland", models=models)) as server:
        report = await probe(client, server.url)
    state = report.state
    assert (state.kind, state.state, state.url, state.last_error) == ("ollama", BackendPhase.UP, server.url, None)
    assert (state.version, set(state.models)) == (profile.VERSION, {model.name for model in models})
    assert state.latency_ms is not None
    assert state.latency_ms > 0
    assert (report.findings, report.url) == ((), server.url)
    assert report.inventory is not None
    assert {info.digest for info in report.inventory.catalog} == {model.digest for model in models}


async def test_the_report_of_a_llama_server(client: httpx.AsyncClient) -> None:
    answers = {
        "/v1/models": {"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"size": 3 << 20, "n_params": 7e9}}]},
        "/health": {"status": "ok"},
        "/props": {"total_slots": 4, "build_info": "b1234", "default_generation_settings": {"n_ctx": 4096}},
        "/version": {},
    }

    async def script(exchange: Exchange) -> None:
        await exchange.send(json_response(answers[request_path(exchange)]))

    async with serve(script) as server:
        report = await probe(client, server.url, spec=OPENAI)
    assert (report.state.state, report.state.version, report.state.models) == (BackendPhase.UP, "b1234", ("tiny",))
    (loaded,) = report.state.loaded
    assert (loaded.name, loaded.context_length) == ("tiny", 4096)
    assert report.inventory is not None
    assert report.inventory.parallel == 4


async def test_optional_answers_may_hang_or_be_missing(client: httpx.AsyncClient) -> None:
    """vLLM has no /props, Ollama's oldest no /api/ps; neither makes a server unusable."""

    async def script(exchange: Exchange) -> None:
        if request_path(exchange) == "/v1/models":
            await exchange.send(json_response({"data": [{"id": "m"}]}))
        elif request_path(exchange) == "/health":
            await exchange.wait_client_gone()
            exchange.closed = True
        elif request_path(exchange) == "/props":
            exchange.reset()
        else:
            await exchange.send(whole_response(b"not found", status="404 Not Found"))

    async with serve(script) as server:
        report = await probe(client, server.url, spec=OPENAI)
    assert report.state.models == ("m",)
    assert report.findings == ()


async def test_the_host_header_is_the_servers_own_address(client: httpx.AsyncClient) -> None:
    """Ollama on loopback refuses the name of our end of the tunnel without a word."""
    seen: set[str | None] = set()

    async def script(exchange: Exchange) -> None:
        seen.add(request_header(exchange, "Host"))
        await exchange.send(json_response({"version": "0.12.6", "models": []}))

    async with serve(script) as server:
        await probe(client, server.url)
    assert seen == {"127.0.0.1:11434"}


async def test_the_api_key_is_sent(client: httpx.AsyncClient) -> None:
    async def script(exchange: Exchange) -> None:
        right = request_header(exchange, "Authorization") == "Bearer secret"
        await exchange.send(
            json_response({"version": "1", "models": []}) if right else whole_response(b"{}", status="401 Unauthorized")
        )

    async with serve(script) as server:
        assert (await probe(client, server.url, key="secret")).findings == ()
        (finding,) = (await probe(client, server.url)).findings
    assert finding.code == "key-refused"


# -- candidates ------------------------------------------------------------------------------------------------------

CLOSED_PORT = "http://127.0.0.1:1"  # nothing listens there


async def test_the_first_in_order_that_answers_is_used(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as first, SimOllama(profile.make_host("two")) as second:
        assert (await probe(client, first.url, second.url)).url == first.url
        assert (await probe(client, second.url, first.url)).url == second.url
        assert (await probe(client, CLOSED_PORT, second.url)).url == second.url
        await first.set_faults(profile.Faults(status=500))
        assert (await probe(client, first.url, second.url)).url == second.url


async def test_a_candidate_that_hangs_delays_a_later_one_only_a_little(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as first, SimOllama(profile.make_host("two")) as second:
        await first.set_faults(profile.Faults(hang=True))
        loop = asyncio.get_running_loop()
        began = loop.time()
        report = await probe(client, first.url, second.url, timeout_s=60.0)
        assert loop.time() - began < 30.0
    assert report.url == second.url


async def test_no_candidate_answers(client: httpx.AsyncClient) -> None:
    report = await probe(client, CLOSED_PORT, "http://127.0.0.1:2")
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.node) == ("backend-down", Severity.ERROR, "iceland")
    assert finding.message == f"{CLOSED_PORT}: it gave no answer: connection refused", "the system's text, not httpx's"
    assert (report.state.state, report.url, report.inventory) == (BackendPhase.DOWN, None, None)
    assert (report.state.last_error, report.state.error_code) == (finding.message, "backend-down")


async def test_a_connection_that_is_reset_has_no_server_behind_it(client: httpx.AsyncClient) -> None:
    """So it is at the end of a tunnel when nothing listens on the host."""

    async def script(exchange: Exchange) -> None:
        sock = exchange.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.reset()

    async with serve(script) as server:
        (finding,) = (await probe(client, server.url)).findings
    assert finding.code == "backend-down"
    assert finding.message.endswith("it gave no answer: connection reset by peer")
    assert "start the server" in (finding.hint or "")


async def test_a_wrong_answer_is_reported_rather_than_no_answer(client: httpx.AsyncClient) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(b"<html><title>Open WebUI</title></html>", kind="text/html"))

    async with serve(script) as server:
        (finding,) = (await probe(client, CLOSED_PORT, server.url)).findings
    assert finding.code == "wrong-server"
    assert 'a web page, "Open WebUI"' in finding.message


async def test_without_a_url_the_server_is_down(client: httpx.AsyncClient) -> None:
    (finding,) = (await probe(client)).findings
    assert finding.code == "backend-down"


# -- what a server lists ---------------------------------------------------------------------------------------------


async def test_hostile_names_are_made_safe(client: httpx.AsyncClient) -> None:
    hostile = "\x1b]0;owned\x07qwen\x1b[31m\u202e"
    entry = {"name": hostile, "digest": hostile, "size": "x", "modified_at": 5, "details": [1]}

    async def script(exchange: Exchange) -> None:
        await exchange.send(json_response({"version": hostile, "models": [entry, None, 5, {"name": ""}]}))

    async with serve(script) as server:
        report = await probe(client, server.url)
    assert (report.state.version, report.state.models) == ("qwen", ("qwen",))
    assert report.state.catalog[0].digest == "qwen"
    assert (report.state.catalog[0].size_mib, report.state.catalog[0].modified_at) == (None, None)


async def test_a_probe_that_is_cancelled_leaves_no_connection(client: httpx.AsyncClient) -> None:
    client_gone = asyncio.Event()
    request_came = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        request_came.set()
        await exchange.wait_client_gone()
        exchange.closed = True
        client_gone.set()

    server: ScriptedServer
    async with serve(script) as server:
        task = asyncio.create_task(probe(client, server.url))
        async with asyncio.timeout(PATIENCE_S):
            await request_came.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client_gone.wait()


@pytest.mark.parametrize("owner", [["vllm"], {}, None, 5, True])
async def test_an_owner_that_is_not_text_is_ignored(client: httpx.AsyncClient, owner: Any) -> None:
    async with serve(answer_with(json_response({"data": [{"id": "m", "owned_by": owner}]}))) as server:
        report = await probe(client, server.url, spec=OPENAI)
    assert (report.state.models, report.state.loaded) == (("m",), ())


async def test_models_without_a_usable_name_are_left_out_and_reported(client: httpx.AsyncClient) -> None:
    models = [{"name": "x" * 1_000_000}, {"name": "m"}, {"name": "\ud800"}, {"name": ["n"]}, {"name": "M:latest"}]
    async with serve(answer_with(json_response({"version": "0.12.6", "models": models}))) as server:
        report = await probe(client, server.url)
    assert report.state.models == ("m",)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("model-unusable", Severity.WARNING)
    assert finding.message.startswith("3 entries")
    assert "model-unusable" in CATALOG


async def test_a_bug_in_reading_an_answer_costs_the_node_and_is_logged(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(OllamaDialect):
        def read_inventory(self, answers: ProbeAnswers) -> Inventory:
            raise TypeError("unhashable type: 'list'")

    monkeypatch.setitem(DIALECTS, BackendKind.OLLAMA, Fails())
    async with serve(answer_with(json_response({"version": "0.12.6", "models": []}))) as server:
        report = await probe(client, server.url)
    assert (report.state.state, report.state.error_code) == (BackendPhase.DOWN, "answer-broken")
    assert "unhashable" in caplog.text
