"""The probe against servers that answer wrongly: each has its own finding, with a hint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest

from gpumesh.audit.catalog import CATALOG
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.probes.bounded_get import BODY_LIMIT
from gpumesh.state import BackendPhase
from tests.mesh.servers import (
    LAST_CHUNK,
    Exchange,
    answer_with,
    chunk,
    chunked_head,
    serve,
    whole_response,
)
from tests.probes.probed_servers import OPENAI, json_response, probe, request_path

page = answer_with(whole_response(b"<!DOCTYPE html><title>nginx \x1b[31m</title>", kind="text/html"))
openai_server = answer_with(
    whole_response(b'{"error": {"message": "not found", "type": "invalid_request_error"}}', status="404 Not Found")
)
other_json = answer_with(json_response({"hello": "world"}))
json_list = answer_with(json_response([1, 2, 3]))
host_refused = answer_with(whole_response(b"", status="403 Forbidden"))
missing_key = answer_with(whole_response(b'{"error":"unauthorized"}', status="401 Unauthorized"))
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
not_found = answer_with(whole_response(b"404 page not found", status="404 Not Found", kind="text/plain"))
redis = answer_with(b"-DENIED Redis is running in protected mode\r\n", close=True)
mail_server = answer_with(b"220 mail ESMTP\r\n", close=True)
noise = answer_with(bytes(range(256)), close=True)


def ollama(tags: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
    """An Ollama whose list of models is ``tags``."""

    async def script(exchange: Exchange) -> None:
        if request_path(exchange) == "/api/tags":
            await tags(exchange)
        else:
            await exchange.send(json_response({"version": "0.12.6", "models": []}))

    return script


MODEL = {"name": "qwen2.5:7b", "size": 4683087332, "digest": "a" * 64, "details": {"family": "qwen2"}}


async def ten_thousand_models(exchange: Exchange) -> None:
    await exchange.send(json_response({"models": [MODEL | {"name": f"m{number}"} for number in range(10_001)]}))


async def hundred_thousand_models(exchange: Exchange) -> None:
    await exchange.send(json_response({"models": [MODEL | {"name": f"m{number}"} for number in range(100_000)]}))


half_list = answer_with(whole_response(b'{"models":[{"name":"qwen2.5:7b","si'))
half_list_and_reset = answer_with(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"models":[', reset=True)
no_list = answer_with(json_response({"models": "none"}))


async def silent(exchange: Exchange) -> None:
    await exchange.wait_client_gone()
    exchange.closed = True


@dataclass(frozen=True)
class WrongAnswer:
    script: Callable[[Exchange], Awaitable[None]]
    code: str
    message: str
    hint: str


WRONG_ANSWERS = {
    "a web page": WrongAnswer(page, "wrong-server", 'a web page, "nginx"', "11434"),
    "an OpenAI server": WrongAnswer(
        openai_server, "wrong-server", "an OpenAI-compatible server", "leave out `backend.kind`"
    ),
    "other JSON": WrongAnswer(other_json, "wrong-server", "hello", "backend.port"),
    "a list": WrongAnswer(json_list, "wrong-server", "[1, 2, 3]", "backend.port"),
    "Host refused": WrongAnswer(host_refused, "host-refused", "Host header", "OLLAMA_HOST=0.0.0.0"),
    "wants a key": WrongAnswer(missing_key, "key-refused", "unauthorized", "api_key_env"),
    "a page that forbids": WrongAnswer(forbidden_page, "key-refused", "403 Forbidden", "a proxy stands before it"),
    "loading": WrongAnswer(loading, "backend-down", "Loading model", "wait until it has loaded"),
    "error 500": WrongAnswer(fails, "backend-down", "oops", "log on its host"),
    "error 502": WrongAnswer(bad_gateway, "backend-down", "502 Bad Gateway", "the server behind it does not"),
    "error 429": WrongAnswer(busy, "backend-down", "HTTP 429", "limit of requests"),
    "error 404": WrongAnswer(not_found, "wrong-server", "/api/version gave HTTP 404", "11434"),
    "error 404 to the list": WrongAnswer(ollama(not_found), "wrong-server", "/api/tags gave HTTP 404", "all of /api/"),
    "closes": WrongAnswer(closes, "backend-down", "closed the connection", "something else listens"),
    "resets": WrongAnswer(resets, "backend-down", "", "start the server"),
    "cut short": WrongAnswer(cut_short, "answer-broken", "in the middle of its answer", "log on its host"),
    "half a list": WrongAnswer(
        ollama(half_list), "answer-broken", "/api/tags gave what is no whole JSON", "log on its host"
    ),
    "half a list, and gone": WrongAnswer(
        ollama(half_list_and_reset), "answer-broken", "in the middle", "log on its host"
    ),
    "no list": WrongAnswer(ollama(no_list), "wrong-server", '\'{"models": "none"}\'', "all of /api/"),
    "more models than are read": WrongAnswer(
        ollama(ten_thousand_models), "models-too-many", "lists 10001 models", "remove"
    ),
    "100,000 models": WrongAnswer(ollama(hundred_thousand_models), "models-too-many", "8 MiB of models", "remove"),
    "endless": WrongAnswer(endless, "wrong-server", "more than 8 MiB", "backend.port"),
    "an SSH server": WrongAnswer(ssh_server, "wrong-server", "an SSH server, 'SSH-2.0-OpenSSH_9.6", "ssh.port"),
    "a database": WrongAnswer(database, "wrong-server", "not with HTTP", "backend.port"),
    "a Redis": WrongAnswer(redis, "wrong-server", "a Redis, '-DENIED", "another service"),
    "a mail server": WrongAnswer(mail_server, "wrong-server", "a mail or FTP server, '220", "another service"),
    "noise": WrongAnswer(noise, "wrong-server", "not with HTTP", "another service"),
    "redirects": WrongAnswer(redirects, "redirected", "HTTP 302, to http://127.0.0.1:1/", "a login page"),
    "wants HTTPS": WrongAnswer(wants_https, "redirected", "HTTP 301, to https://127.0.0.1/", "write https://"),
    "HTTPS, and says so": WrongAnswer(plain_to_https, "wrong-scheme", "speaks HTTPS", "url: https://"),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
async def test_a_wrong_answer_has_its_own_finding(client: httpx.AsyncClient, name: str) -> None:
    expected = WRONG_ANSWERS[name]
    async with serve(expected.script) as server:
        report = await probe(client, server.url)
    (finding,) = report.findings
    assert finding.code == expected.code
    assert finding.code in CATALOG
    assert expected.message in finding.message
    assert finding.hint, "every finding says what to do"
    assert expected.hint in finding.hint
    if expected.code != "backend-down":
        assert "start the server" not in finding.hint, "a server runs there, of whatever kind"
    assert "127.0.0.1:11434" in finding.message, "the address on the host, not our end of the tunnel"
    assert finding.message.isprintable()
    assert (report.state.state, report.state.models) == (BackendPhase.DOWN, ())


async def test_an_api_key_that_is_refused(client: httpx.AsyncClient) -> None:
    async with serve(missing_key) as server:
        (finding,) = (await probe(client, server.url, key="wrong")).findings
    assert finding.code == "key-refused"
    assert "check the variable" in (finding.hint or "")
    assert "wrong" not in f"{finding.message}{finding.hint}"


async def test_a_server_that_is_silent(client: httpx.AsyncClient) -> None:
    async with serve(silent) as server:
        (finding,) = (await probe(client, server.url, timeout_s=0.2)).findings
    assert (finding.code, "0.2 s" in finding.message) == ("backend-down", True)
    assert "stuck" in (finding.hint or "")


async def test_an_ollama_where_an_openai_server_should_be(client: httpx.AsyncClient) -> None:
    """Ollama speaks /v1 as well, so that is right; what has no /v1 is not."""
    async with SimOllama(profile.make_host("one")) as server:
        assert (await probe(client, server.url, spec=OPENAI)).state.models == ("qwen2.5:7b",)
    async with serve(page) as other:
        (finding,) = (await probe(client, other.url, spec=OPENAI)).findings
    assert (finding.code, "leave out `backend.kind`" in (finding.hint or "")) == ("wrong-server", True)


@pytest.mark.parametrize("location", ["http://xn--zzzzzzz--/", "http://[", "//xn--a-/"])
async def test_a_redirect_to_an_invalid_name_is_a_finding(client: httpx.AsyncClient, location: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    async with serve(answer_with(answer)) as server:
        report = await probe(client, server.url)
    assert report.state.state is BackendPhase.DOWN
    assert [finding.code for finding in report.findings] != []
