"""Against the lab's stand-in, and against sockets that say what no server should."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from gpumesh.audit.catalog import CATALOG
from gpumesh.backends.base import Inventory
from gpumesh.backends.dialects import DIALECTS
from gpumesh.backends.ollama import OllamaDialect, ProbeAnswers
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.probes.backend import BackendReport, probe_backend
from gpumesh.probes.bounded_get import BODY_LIMIT
from gpumesh.state import BackendPhase, Severity
from gpumesh.topology import BackendKind, BackendSpec, Target
from tests.mesh.servers import (
    LAST_CHUNK,
    Exchange,
    ScriptedServer,
    answer_with,
    chunk,
    chunked_head,
    serve,
    whole_response,
)

PATIENCE_S = 20.0
OLLAMA = BackendSpec(targets=(Target("127.0.0.1", 11434),))
OPENAI = BackendSpec(kind=BackendKind.OPENAI, targets=(Target("127.0.0.1", 8080),))


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as made:
        yield made


async def asked(
    client: httpx.AsyncClient,
    *urls: str,
    spec: BackendSpec = OLLAMA,
    key: str | None = None,
    timeout_s: float = PATIENCE_S,
) -> BackendReport:
    return await probe_backend(client, spec, urls, api_key=key, timeout_s=timeout_s, node="iceland")


def path_of(exchange: Exchange) -> str:
    return exchange.head.split(b" ")[1].decode()


def header(exchange: Exchange, name: str) -> str | None:
    for line in exchange.head.decode().split("\r\n")[1:]:
        key, _, value = line.partition(": ")
        if key.lower() == name.lower():
            return value
    return None


def json_of(document: Any) -> bytes:
    return whole_response(json.dumps(document).encode())


# -- servers that are right ------------------------------------------------------------------------------------------


async def test_what_ollama_says_of_itself(client: httpx.AsyncClient) -> None:
    models = (profile.QWEN_7B, profile.EMBEDDER)
    async with SimOllama(profile.make_host("iceland", models=models)) as server:
        report = await asked(client, server.url)
    state = report.state
    assert (state.kind, state.state, state.url, state.last_error) == ("ollama", BackendPhase.UP, server.url, None)
    assert (state.version, set(state.models)) == (profile.VERSION, {model.name for model in models})
    assert state.latency_ms is not None
    assert state.latency_ms > 0
    assert (report.findings, report.url) == ((), server.url)
    assert report.inventory is not None
    assert {info.digest for info in report.inventory.catalog} == {model.digest for model in models}


async def test_what_llama_server_says_of_itself(client: httpx.AsyncClient) -> None:
    answers = {
        "/v1/models": {"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"size": 3 << 20, "n_params": 7e9}}]},
        "/health": {"status": "ok"},
        "/props": {"total_slots": 4, "build_info": "b1234", "default_generation_settings": {"n_ctx": 4096}},
        "/version": {},
    }

    async def script(exchange: Exchange) -> None:
        await exchange.send(json_of(answers[path_of(exchange)]))

    async with serve(script) as server:
        report = await asked(client, server.url, spec=OPENAI)
    assert (report.state.state, report.state.version, report.state.models) == (BackendPhase.UP, "b1234", ("tiny",))
    (loaded,) = report.state.loaded
    assert (loaded.name, loaded.context_length) == ("tiny", 4096)
    assert report.inventory is not None
    assert report.inventory.parallel == 4


async def test_what_is_not_needed_may_hang_or_be_missing(client: httpx.AsyncClient) -> None:
    """vLLM has no /props, Ollama's oldest no /api/ps; neither makes a server unusable."""

    async def script(exchange: Exchange) -> None:
        if path_of(exchange) == "/v1/models":
            await exchange.send(json_of({"data": [{"id": "m"}]}))
        elif path_of(exchange) == "/health":
            await exchange.wait_client_gone()
            exchange.closed = True
        elif path_of(exchange) == "/props":
            exchange.reset()
        else:
            await exchange.send(whole_response(b"not found", status="404 Not Found"))

    async with serve(script) as server:
        report = await asked(client, server.url, spec=OPENAI)
    assert report.state.models == ("m",)
    assert report.findings == ()


async def test_the_host_header_is_the_hosts_own(client: httpx.AsyncClient) -> None:
    """Ollama on loopback refuses the name of our end of the tunnel without a word."""
    seen: set[str | None] = set()

    async def script(exchange: Exchange) -> None:
        seen.add(header(exchange, "Host"))
        await exchange.send(json_of({"version": "0.12.6", "models": []}))

    async with serve(script) as server:
        await asked(client, server.url)
    assert seen == {"127.0.0.1:11434"}


async def test_the_key_goes_along(client: httpx.AsyncClient) -> None:
    async def script(exchange: Exchange) -> None:
        right = header(exchange, "Authorization") == "Bearer secret"
        await exchange.send(
            json_of({"version": "1", "models": []}) if right else whole_response(b"{}", status="401 Unauthorized")
        )

    async with serve(script) as server:
        assert (await asked(client, server.url, key="secret")).findings == ()
        (finding,) = (await asked(client, server.url)).findings
    assert finding.code == "key-refused"


# -- candidates ------------------------------------------------------------------------------------------------------

FREE = "http://127.0.0.1:1"  # nothing listens there


async def test_the_first_in_order_that_answers_is_used(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one, SimOllama(profile.make_host("two")) as two:
        assert (await asked(client, one.url, two.url)).url == one.url
        assert (await asked(client, two.url, one.url)).url == two.url
        assert (await asked(client, FREE, two.url)).url == two.url
        await one.set_faults(profile.Faults(status=500))
        assert (await asked(client, one.url, two.url)).url == two.url


async def test_a_candidate_that_hangs_is_not_waited_for_for_long(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_host("one")) as one, SimOllama(profile.make_host("two")) as two:
        await one.set_faults(profile.Faults(hang=True))
        loop = asyncio.get_running_loop()
        began = loop.time()
        report = await asked(client, one.url, two.url, timeout_s=60.0)
        assert loop.time() - began < 30.0
    assert report.url == two.url


async def test_nobody_answers(client: httpx.AsyncClient) -> None:
    report = await asked(client, FREE, "http://127.0.0.1:2")
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.node) == ("backend-down", Severity.ERROR, "iceland")
    assert finding.message == f"{FREE}: it gave no answer: connection refused", "the system's words, not httpx's"
    assert (report.state.state, report.url, report.inventory) == (BackendPhase.DOWN, None, None)
    assert (report.state.last_error, report.state.error_code) == (finding.message, "backend-down")


async def test_a_connection_that_is_reset_has_nobody_behind_it(client: httpx.AsyncClient) -> None:
    """So it is at the end of a tunnel when nothing listens on the host."""

    async def script(exchange: Exchange) -> None:
        sock = exchange.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.reset()

    async with serve(script) as server:
        (finding,) = (await asked(client, server.url)).findings
    assert finding.code == "backend-down"
    assert finding.message.endswith("it gave no answer: connection reset by peer")
    assert "start the server" in (finding.hint or "")


async def test_who_answers_wrongly_says_more_than_who_is_silent(client: httpx.AsyncClient) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(whole_response(b"<html><title>Open WebUI</title></html>", kind="text/html"))

    async with serve(script) as server:
        (finding,) = (await asked(client, FREE, server.url)).findings
    assert finding.code == "wrong-server"
    assert 'a web page, "Open WebUI"' in finding.message


async def test_no_way_at_all(client: httpx.AsyncClient) -> None:
    (finding,) = (await asked(client)).findings
    assert finding.code == "backend-down"


# -- servers that are wrong ------------------------------------------------------------------------------------------


page = answer_with(whole_response(b"<!DOCTYPE html><title>nginx \x1b[31m</title>", kind="text/html"))
openai_server = answer_with(
    whole_response(b'{"error": {"message": "not found", "type": "invalid_request_error"}}', status="404 Not Found")
)
other_json = answer_with(json_of({"hello": "world"}))
a_list = answer_with(json_of([1, 2, 3]))
refused_host = answer_with(whole_response(b"", status="403 Forbidden"))
wants_a_key = answer_with(whole_response(b'{"error":"unauthorized"}', status="401 Unauthorized"))
loading = answer_with(whole_response(b'{"error":{"message":"Loading model"}}', status="503 Service Unavailable"))
fails = answer_with(whole_response(b"\x1b[2Joops", status="500 Internal Server Error"))
busy = answer_with(whole_response(b"", status="429 Too Many Requests"))
closes = answer_with(close=True)
resets = answer_with(reset=True)
cut_short = answer_with(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"version"', close=True)


async def endless(exchange: Exchange) -> None:
    await exchange.send(chunked_head())
    piece = chunk(b" " * (1 << 20))
    for _ in range((BODY_LIMIT >> 20) + 2):
        await exchange.send(piece)
    await exchange.send(LAST_CHUNK)


ssh_server = answer_with(b"SSH-2.0-OpenSSH_9.6\r\nInvalid SSH identification string.\r\n", close=True)
database = answer_with(b"-ERR wrong number of arguments for 'get' command\r\n\r\n", close=True)
redirects = answer_with(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
wants_https = answer_with(
    b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
)
plain_to_https = answer_with(  # as Go's own server says it
    whole_response(b"Client sent an HTTP request to an HTTPS server.\n", status="400 Bad Request", kind="text/plain")
)
forbidden_page = answer_with(whole_response(b"<html><title>403 Forbidden</title></html>", status="403 Forbidden"))
bad_gateway = answer_with(whole_response(b"<html><title>502 Bad Gateway</title></html>", status="502 Bad Gateway"))
nothing_there = answer_with(whole_response(b"404 page not found", status="404 Not Found", kind="text/plain"))
redis = answer_with(b"-DENIED Redis is running in protected mode\r\n", close=True)
mail_server = answer_with(b"220 mail ESMTP\r\n", close=True)
noise = answer_with(bytes(range(256)), close=True)


def ollama(tags: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
    """It says its version rightly."""

    async def script(exchange: Exchange) -> None:
        if path_of(exchange) == "/api/tags":
            await tags(exchange)
        else:
            await exchange.send(json_of({"version": "0.12.6", "models": []}))

    return script


MODEL = {"name": "qwen2.5:7b", "size": 4683087332, "digest": "a" * 64, "details": {"family": "qwen2"}}


async def too_many(exchange: Exchange) -> None:
    await exchange.send(json_of({"models": [MODEL | {"name": f"m{number}"} for number in range(10_001)]}))


async def a_hundred_thousand(exchange: Exchange) -> None:
    await exchange.send(json_of({"models": [MODEL | {"name": f"m{number}"} for number in range(100_000)]}))


half = answer_with(whole_response(b'{"models":[{"name":"qwen2.5:7b","si'))
half_sent = answer_with(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"models":[', reset=True)
no_list = answer_with(json_of({"models": "none"}))


async def silent(exchange: Exchange) -> None:
    await exchange.wait_client_gone()
    exchange.closed = True


@dataclass(frozen=True)
class Wrong:
    script: Callable[[Exchange], Awaitable[None]]
    code: str
    message: str
    hint: str


WRONG = {
    "a web page": Wrong(page, "wrong-server", 'a web page, "nginx"', "11434"),
    "an OpenAI server": Wrong(openai_server, "wrong-server", "an OpenAI-compatible server", "backend.kind: openai"),
    "other JSON": Wrong(other_json, "wrong-server", "hello", "backend.port"),
    "a list": Wrong(a_list, "wrong-server", "[1, 2, 3]", "backend.port"),
    "Host refused": Wrong(refused_host, "host-refused", "Host header", "OLLAMA_HOST=0.0.0.0"),
    "wants a key": Wrong(wants_a_key, "key-refused", "unauthorized", "api_key_env"),
    "a page that forbids": Wrong(forbidden_page, "key-refused", "403 Forbidden", "a proxy stands before it"),
    "loading": Wrong(loading, "backend-down", "Loading model", "wait until it has loaded"),
    "error 500": Wrong(fails, "backend-down", "oops", "log on its host"),
    "error 502": Wrong(bad_gateway, "backend-down", "502 Bad Gateway", "the server behind it does not"),
    "error 429": Wrong(busy, "backend-down", "HTTP 429", "limit of requests"),
    "error 404": Wrong(nothing_there, "wrong-server", "/api/version gave HTTP 404", "11434"),
    "error 404 to the list": Wrong(ollama(nothing_there), "wrong-server", "/api/tags gave HTTP 404", "all of /api/"),
    "closes": Wrong(closes, "backend-down", "closed the connection", "something else listens"),
    "resets": Wrong(resets, "backend-down", "", "start the server"),
    "cut short": Wrong(cut_short, "answer-broken", "in the middle of its answer", "log on its host"),
    "half a list": Wrong(ollama(half), "answer-broken", "/api/tags gave what is no whole JSON", "log on its host"),
    "half a list, and gone": Wrong(ollama(half_sent), "answer-broken", "in the middle", "log on its host"),
    "no list": Wrong(ollama(no_list), "wrong-server", '\'{"models": "none"}\'', "all of /api/"),
    "more models than are read": Wrong(ollama(too_many), "models-too-many", "lists 10001 models", "remove"),
    "100,000 models": Wrong(ollama(a_hundred_thousand), "models-too-many", "8 MiB of models", "remove"),
    "endless": Wrong(endless, "wrong-server", "more than 8 MiB", "backend.port"),
    "an SSH server": Wrong(ssh_server, "wrong-server", "an SSH server, 'SSH-2.0-OpenSSH_9.6", "ssh.port"),
    "a database": Wrong(database, "wrong-server", "not with HTTP", "backend.port"),
    "a Redis": Wrong(redis, "wrong-server", "a Redis, '-DENIED", "another service"),
    "a mail server": Wrong(mail_server, "wrong-server", "a mail or FTP server, '220", "another service"),
    "noise": Wrong(noise, "wrong-server", "not with HTTP", "another service"),
    "redirects": Wrong(redirects, "redirected", "HTTP 302, to http://127.0.0.1:1/", "a login page"),
    "wants HTTPS": Wrong(wants_https, "redirected", "HTTP 301, to https://127.0.0.1/", "write https://"),
    "HTTPS, and says so": Wrong(plain_to_https, "wrong-scheme", "speaks HTTPS", "url: https://"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_server_that_is_none(client: httpx.AsyncClient, name: str) -> None:
    wrong = WRONG[name]
    async with serve(wrong.script) as server:
        report = await asked(client, server.url)
    (finding,) = report.findings
    assert finding.code == wrong.code
    assert finding.code in CATALOG
    assert wrong.message in finding.message
    assert finding.hint, "there is something to do about everything"
    assert wrong.hint in finding.hint
    if wrong.code != "backend-down":
        assert "start the server" not in finding.hint, "it runs, whatever it is"
    assert "127.0.0.1:11434" in finding.message, "as the host knows it, not as our end of the tunnel is called"
    assert finding.message.isprintable()
    assert (report.state.state, report.state.models) == (BackendPhase.DOWN, ())


async def test_a_key_that_is_not_accepted(client: httpx.AsyncClient) -> None:
    async with serve(wants_a_key) as server:
        (finding,) = (await asked(client, server.url, key="wrong")).findings
    assert finding.code == "key-refused"
    assert "check the variable" in (finding.hint or "")
    assert "wrong" not in f"{finding.message}{finding.hint}"


async def test_a_server_that_is_silent(client: httpx.AsyncClient) -> None:
    async with serve(silent) as server:
        (finding,) = (await asked(client, server.url, timeout_s=0.2)).findings
    assert (finding.code, "0.2 s" in finding.message) == ("backend-down", True)
    assert "stuck" in (finding.hint or "")


async def test_an_ollama_where_an_openai_server_should_be(client: httpx.AsyncClient) -> None:
    """Ollama speaks /v1 as well, so that is right; what has no /v1 is not."""
    async with SimOllama(profile.make_host("one")) as server:
        assert (await asked(client, server.url, spec=OPENAI)).state.models == ("qwen2.5:7b",)
    async with serve(page) as other:
        (finding,) = (await asked(client, other.url, spec=OPENAI)).findings
    assert (finding.code, "backend.kind: ollama" in (finding.hint or "")) == ("wrong-server", True)


async def test_hostile_names_are_made_safe(client: httpx.AsyncClient) -> None:
    hostile = "\x1b]0;owned\x07qwen\x1b[31m\u202e"
    entry = {"name": hostile, "digest": hostile, "size": "x", "modified_at": 5, "details": [1]}

    async def script(exchange: Exchange) -> None:
        await exchange.send(json_of({"version": hostile, "models": [entry, None, 5, {"name": ""}]}))

    async with serve(script) as server:
        report = await asked(client, server.url)
    assert (report.state.version, report.state.models) == ("qwen", ("qwen",))
    assert report.state.catalog[0].digest == "qwen"
    assert (report.state.catalog[0].size_mib, report.state.catalog[0].modified_at) == (None, None)


async def test_a_probe_that_is_cancelled_leaves_no_connection(client: httpx.AsyncClient) -> None:
    gone = asyncio.Event()
    came = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        came.set()
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.set()

    server: ScriptedServer
    async with serve(script) as server:
        task = asyncio.create_task(asked(client, server.url))
        async with asyncio.timeout(PATIENCE_S):
            await came.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone.wait()


@pytest.mark.parametrize("location", ["http://xn--zzzzzzz--/", "http://[", "//xn--a-/"])
async def test_a_redirect_to_a_name_that_is_none_is_the_servers_fault(client: httpx.AsyncClient, location: str) -> None:
    """It raised in the probe, and the probe's end was that of the whole mesh."""
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    async with serve(answer_with(answer)) as server:
        report = await asked(client, server.url)
    assert report.state.state is BackendPhase.DOWN
    assert [finding.code for finding in report.findings] != []


@pytest.mark.parametrize("owner", [["vllm"], {}, None, 5, True])
async def test_an_owner_that_is_no_text(client: httpx.AsyncClient, owner: Any) -> None:
    async with serve(answer_with(json_of({"data": [{"id": "m", "owned_by": owner}]}))) as server:
        report = await asked(client, server.url, spec=OPENAI)
    assert (report.state.models, report.state.loaded) == (("m",), ())


async def test_what_cannot_be_asked_for_is_left_out_and_told(client: httpx.AsyncClient) -> None:
    models = [{"name": "x" * 1_000_000}, {"name": "m"}, {"name": "\ud800"}, {"name": ["n"]}, {"name": "M:latest"}]
    async with serve(answer_with(json_of({"version": "0.12.6", "models": models}))) as server:
        report = await asked(client, server.url)
    assert report.state.models == ("m",)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("model-unusable", Severity.WARNING)
    assert finding.message.startswith("3 entries")
    assert "model-unusable" in CATALOG


async def test_what_nobody_foresaw_costs_its_node_and_leaves_a_trace(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(OllamaDialect):
        def read_inventory(self, answers: ProbeAnswers) -> Inventory:
            raise TypeError("unhashable type: 'list'")

    monkeypatch.setitem(DIALECTS, BackendKind.OLLAMA, Fails())
    async with serve(answer_with(json_of({"version": "0.12.6", "models": []}))) as server:
        report = await asked(client, server.url)
    assert (report.state.state, report.state.error_code) == (BackendPhase.DOWN, "answer-broken")
    assert "unhashable" in caplog.text
