"""What a browser gets and what is refused to it, whatever a hostile host answers, on real sockets.

The same with a real browser: tests/real/test_hostile_pages.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gpumesh.gateway.http.bounds import Bounds
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import MODEL, RunningGateway, node, send_raw, serve_hosts, serve_nodes
from tests.mesh.servers import LAST_CHUNK, Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

PAGE = b"<!doctype html><title>owned</title><script>owned = 1</script>"
FOR_BROWSERS = {
    "content-security-policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}
OURS = {"server", "date", "content-length", "transfer-encoding", "connection", "content-type", *FOR_BROWSERS}
FATE = {"x-gpumesh-node", "x-gpumesh-attempts", "x-gpumesh-queue-ms", "x-gpumesh-error"}
EVIL_HEADERS = (
    b'Set-Cookie: gpumesh=evil; Path=/\r\nService-Worker-Allowed: /\r\nClear-Site-Data: "*"\r\n'
    b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Headers: *\r\n"
    b"X-GPUMesh-Node: evil\r\nX-GPUMesh-Attempts: 99\r\nX-GPUMesh-Why: because\r\nLink: </x>; rel=preload\r\n"
    b"Refresh: 0; url=http://evil.example/\r\nLocation: http://evil.example/\r\nContent-Disposition: inline\r\n"
    b'Alt-Svc: h3=":443"\r\nSourceMap: /x\r\nNEL: {}\r\nReport-To: {}\r\nStrict-Transport-Security: max-age=99\r\n'
    b'WWW-Authenticate: Basic realm="gpumesh"\r\nProxy-Authenticate: Basic realm=x\r\nSpeculation-Rules: "/x"\r\n'
    b"Content-Security-Policy: script-src *\r\nX-Content-Type-Options: sniff\r\nX-Frame-Options: ALLOWALL\r\n"
    b"Cross-Origin-Resource-Policy: cross-origin\r\nReferrer-Policy: unsafe-url\r\nServer: evil\r\nVary: *\r\n"
    b"Cache-Control: max-age=31536000\r\nX-Odd: \xff\xfe\r\n"
)
KEPT_HEADERS = b"Retry-After: 7\r\nx-ratelimit-remaining-requests: 5\r\n"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": False}
PASSED_ON = [("POST", path) for path in MODEL_ROUTES] + [
    ("GET", f"/v1/models/{MODEL}"),
    ("GET", "/api/status"),
    ("POST", "/api/me"),
    ("POST", "/api/signout"),
]
DIGEST = "sha256:" + "0" * 64
STORES: list[tuple[str, str, Any]] = [
    ("POST", "/api/pull", {"model": MODEL, "stream": False}),
    ("POST", "/api/pull", {"model": MODEL}),
    ("POST", "/api/push", {"model": MODEL}),
    ("POST", "/api/create", {"model": MODEL, "from": MODEL}),
    ("POST", "/api/copy", {"source": MODEL, "destination": "x"}),
    ("DELETE", "/api/delete", {"model": MODEL}),
    ("HEAD", f"/api/blobs/{DIGEST}", None),
    ("POST", f"/api/blobs/{DIGEST}", None),
]
OWN = [("GET", path) for path in ("/", "/healthz", "/metrics", "/mesh/status", "/api/version", "/api/tags", "/api/ps")]
OWN += [("GET", "/v1/models"), ("HEAD", "/mesh/events"), ("POST", "/mesh/nodes/evil/drain"), ("GET", "/nothing")]
OWN += [("GET", "/v1/nothing"), ("POST", "/"), ("DELETE", "/ui"), ("GET", "/ui/"), ("GET", "/favicon.ico")]


class Host:
    """Answers probes as an Ollama does, and every other request with the answer that was set; counts these."""

    def __init__(self) -> None:
        self.answer = whole_response(b"{}")
        self.asked = 0

    async def __call__(self, exchange: Exchange) -> None:
        known: dict[bytes, Any] = {
            b"/api/version": {"version": "0.12.6"},
            b"/api/tags": {"models": [{"name": MODEL}]},
            b"/api/ps": {"models": []},
        }
        method, path, _ = exchange.head.split(b" ", 2)
        if method == b"GET" and path in known:
            await exchange.send(whole_response(json.dumps(known[path]).encode()))
            return
        self.asked += 1
        await exchange.send(self.answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else self.answer)

    def set_answer(self, body: bytes, kind: str, *, status: str = "200 OK", headers: bytes = b"") -> None:
        self.answer = whole_response(body, status=status, kind=kind).replace(b"\r\n", b"\r\n" + headers, 1)


@asynccontextmanager
async def over(host: Host, **more: Any) -> AsyncIterator[RunningGateway]:
    async with serve(host) as server, serve_nodes((node("evil", server.url),), **more) as fleet:
        yield fleet


@pytest.fixture
async def host() -> Host:
    return Host()


@pytest.fixture
async def fleet(host: Host) -> AsyncIterator[RunningGateway]:
    async with over(host) as made:
        yield made


async def ask(fleet: RunningGateway, method: str, path: str, body: Any = CHAT, **more: Any) -> httpx.Response:
    return await fleet.client.request(method, path, json=body if method in ("POST", "DELETE") else None, **more)


def checked(response: httpx.Response, *, more: frozenset[str] = frozenset()) -> Mapping[str, str]:
    """The answer's headers. Each header for browsers must be there once with its value, and no foreign header."""
    for name, value in FOR_BROWSERS.items():
        assert response.headers.get_list(name) == [value]
    unknown = {name.lower() for name in response.headers} - OURS - FATE - more
    assert not unknown, f"{response.request.method} {response.request.url.path}"
    return response.headers


# -- answers of a host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
async def test_a_hosts_page_never_leaves_the_gateway(fleet: RunningGateway, host: Host, method: str, path: str) -> None:
    for kind in ("text/html", "text/plain;text/html"):
        host.set_answer(PAGE, kind, headers=EVIL_HEADERS)
        answer = await ask(fleet, method, path)
        assert answer.status_code == 502
        assert checked(answer)["Content-Type"] == "application/json"
        error = answer.json()["error"]
        words = error if path.startswith("/api/") else error["message"]
        assert "no answer of an inference server" in words
        assert "evil" in words
        assert b"<script>" not in answer.content


@pytest.mark.parametrize(("method", "path"), PASSED_ON)
async def test_only_the_headers_that_clients_read_are_passed_on(
    fleet: RunningGateway, host: Host, method: str, path: str
) -> None:
    host.set_answer(b'{"done":true}', "Application/JSON; charset=UTF-8", headers=EVIL_HEADERS + KEPT_HEADERS)
    answer = await ask(fleet, method, path)
    assert answer.status_code == 200
    headers = checked(answer, more=frozenset({"retry-after", "x-ratelimit-remaining-requests"}))
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert (headers["Retry-After"], headers["x-ratelimit-remaining-requests"]) == ("7", "5")
    assert answer.headers.get_list("X-GPUMesh-Node") == ["evil"]  # so is its name in mesh.yaml
    assert answer.headers.get_list("X-GPUMesh-Attempts") == ["1"]


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "302 Found", "401 Unauthorized", "500 Oh", "999 Odd"])
async def test_routes_of_stores_pass_on_text_only(fleet: RunningGateway, host: Host, status: str) -> None:
    answers = [(PAGE, "text/html"), (b'{"error":"<b>no</b>"}', "application/json")]
    if status.startswith("2"):  # otherwise a pull would be started again until it succeeds
        answers.append((b'{"status":"<b>x</b>"}\n{"status":"success"}\n', "application/x-ndjson"))
    else:
        answers.append((PAGE, "application/json"))
    for page, kind in answers:
        host.set_answer(page, kind, status=status, headers=EVIL_HEADERS)
        for method, path, body in STORES:
            answer = await ask(fleet, method, path, body)
            headers = checked(answer)
            assert 200 <= answer.status_code < 300 or 400 <= answer.status_code < 600
            assert headers.get("Content-Type") in (None, "application/json", "application/x-ndjson")
            if answer.content:
                assert "Content-Type" in headers
                for line in answer.text.splitlines():
                    json.loads(line)  # the gateway's own document, whatever it quotes


async def test_a_redirect_is_not_passed_on(fleet: RunningGateway, host: Host) -> None:
    for status in ("301 Moved", "302 Found", "307 Temporary", "304 Not Modified", "799 Odd", "999 Odd"):
        host.set_answer(b"", "text/html", status=status, headers=EVIL_HEADERS)
        answer = await ask(fleet, "GET", f"/v1/models/{MODEL}")
        assert answer.status_code == 502
        checked(answer)


async def test_the_page_of_an_error_becomes_an_error_in_the_clients_api(fleet: RunningGateway, host: Host) -> None:
    host.set_answer(b"<html><title>413 Too Large</title>", "text/html", status="413 Too Large", headers=EVIL_HEADERS)
    answer = await ask(fleet, "POST", "/v1/messages")
    assert answer.status_code == 413
    assert answer.json() == {
        "type": "error",
        "error": {"type": "request_too_large", "message": 'evil: HTTP 413 and a web page, "413 Too Large"'},
    }
    checked(answer)
    host.set_answer(PAGE, "text/html", status="401 Unauthorized", headers=EVIL_HEADERS)
    challenged = await ask(fleet, "GET", f"/v1/models/{MODEL}")
    assert challenged.status_code == 401
    assert "WWW-Authenticate" not in challenged.headers, "a browser would ask its user for a password"


async def test_a_stream_has_the_same_headers_against_browsers(fleet: RunningGateway, host: Host) -> None:
    head = chunked_head().replace(b"\r\n", b"\r\n" + EVIL_HEADERS, 1)
    trailers = b"0\r\nSet-Cookie: late=1\r\nX-GPUMesh-Node: late\r\n\r\n"
    host.answer = head + chunk(b'{"message":{"content":"x"},"done":true}\n') + trailers
    answer = await ask(fleet, "POST", "/api/chat", {**CHAT, "stream": True})
    assert answer.status_code == 200
    assert checked(answer, more=frozenset({"x-accel-buffering"}))["Content-Type"] == "application/x-ndjson"
    assert b"late" not in answer.content
    host.answer = chunked_head("text/html") + chunk(PAGE) + LAST_CHUNK
    assert (await ask(fleet, "POST", "/api/chat", {**CHAT, "stream": True})).status_code == 502


async def test_a_body_without_a_type_gets_one_that_no_browser_shows(fleet: RunningGateway, host: Host) -> None:
    host.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PAGE) + PAGE
    answer = await ask(fleet, "POST", "/api/embed")
    assert checked(answer)["Content-Type"] == "application/octet-stream"
    answer = await ask(fleet, "POST", "/api/chat")
    assert answer.status_code == 502, "a page is no answer to a prompt"
    assert checked(answer)["Content-Type"] == "application/json"
    answer = await ask(fleet, "GET", f"/v1/models/{MODEL}")
    assert answer.status_code == 502, "a page is not the document that was asked for"
    assert checked(answer)["Content-Type"] == "application/json"


async def test_another_node_answers_in_place_of_a_page(host: Host) -> None:
    host.set_answer(PAGE, "text/html")
    good = Host()
    good.set_answer(b'{"done":true}', "application/json")
    async with (
        serve(host) as one,
        serve(good) as other,
        # The tier decides which node is asked first.
        serve_nodes((node("a", one.url), replace(node("b", other.url), tier=2))) as fleet,
    ):
        answers = [await ask(fleet, "POST", "/api/chat") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert {answer.headers["X-GPUMesh-Node"] for answer in answers} == {"b"}
        assert answers[0].headers["X-GPUMesh-Attempts"] == "2"


async def test_a_packed_body_is_not_asked_for_nor_taken(host: Host) -> None:
    async with serve(host) as server, serve_nodes((node("evil", server.url),)) as fleet:
        host.set_answer(b"\x1f\x8b\x08", "application/json", headers=b"Content-Encoding: gzip\r\n")
        answer = await ask(fleet, "POST", "/api/chat")
        assert answer.status_code == 502
        heads = [exchange.head for exchange in server.requests if exchange.head.startswith(b"POST")]
        assert all(b"\r\nAccept-Encoding: identity\r\n" in head for head in heads)


# -- answers of the gateway itself ----------------------------------------------------------------------------------


async def test_every_answer_of_the_gateway_itself_has_the_headers_against_browsers(fleet: RunningGateway) -> None:
    for method, path in OWN:
        answer = await fleet.client.request(method, path)
        checked(answer, more=frozenset({"allow", "retry-after", "cache-control"}))
        assert not answer.headers.get("Content-Type", "").startswith("text/html")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 60_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
        (b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\nContent-Length: 2\r\n\r\n", 417),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n{}", 413),
    ],
)
async def test_the_answer_to_what_is_no_request_has_the_headers_against_browsers(
    fleet: RunningGateway, sent: bytes, status: int
) -> None:
    said = await send_raw(fleet.port, sent)
    first, *lines = said.partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    assert first.split()[1] == str(status)
    assert lines.count("x-content-type-options: nosniff") == 1
    assert lines.count(f"content-security-policy: {FOR_BROWSERS['content-security-policy']}") == 1


async def test_the_answer_to_a_connection_too_many_has_the_headers_against_browsers(host: Host) -> None:
    async with over(host, bounds=Bounds(max_connections=1)) as fleet:
        _, writer = await asyncio.open_connection("127.0.0.1", fleet.port)
        writer.write(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
        )  # an idle one would go
        await wait_until(lambda: len(fleet.gateway._active) == 1, "its request is under way")
        said = await send_raw(fleet.port, b"")
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nX-Content-Type-Options: nosniff\r\n" in said
        writer.close()


async def test_the_page_has_a_policy_of_its_own_and_no_frame_shows_it(fleet: RunningGateway) -> None:
    page = await fleet.client.get("/ui", headers={"Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "cross-site"})
    assert page.status_code == 200, "also by a link of another site"
    (policy,) = page.headers.get_list("Content-Security-Policy")
    assert "sandbox" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    for name in FOR_BROWSERS.keys() - {"content-security-policy"}:
        assert page.headers.get_list(name) == [FOR_BROWSERS[name]]


# -- requests of a browser ------------------------------------------------------------------------------------------

DESTINATIONS = (
    "audio audioworklet document embed fencedframe font frame iframe image json manifest object paintworklet report "
    "script serviceworker sharedworker style track video webidentity worker xslt unheard-of Empty"
)


async def test_nothing_is_shown_embedded_or_run(fleet: RunningGateway, host: Host) -> None:
    routes = [*PASSED_ON, *OWN, *((method, path) for method, path, _ in STORES)]
    for destination in DESTINATIONS.split():
        headers = {"Sec-Fetch-Dest": destination, "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
        for method, path in routes if destination in ("document", "script") else routes[::5]:
            if path == "/ui":
                continue
            answer = await ask(fleet, method, path, headers=headers)
            assert answer.status_code == 403, (method, path, destination)
            if method != "HEAD":
                assert "/ui" in answer.text, "which is for people"
            checked(answer)
        page = await fleet.client.get("/ui", headers=headers)
        assert page.status_code == (200 if destination == "document" else 403)
    assert host.asked == 0


async def test_no_script_becomes_a_service_worker(fleet: RunningGateway) -> None:
    for path in ("/ui", f"/v1/models/{MODEL}", "/", "/mesh/status"):
        assert (await fleet.client.get(path, headers={"Service-Worker": "script"})).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Dest": "empty"}, 200),
        ({"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "none"}, 200),  # an extension
        ({"Sec-Fetch-Mode": "cors"}, 200),  # Node's fetch sends nothing else
        ({"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Dest": "empty", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://chat.example.org"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://chat.example.org", "Sec-Fetch-Dest": "script"}, 403),
    ],
)
async def test_which_requests_of_pages_are_answered(host: Host, headers: dict[str, str], status: int) -> None:
    host.set_answer(b'{"done":true}', "application/json", headers=EVIL_HEADERS)
    async with over(host, spec=GatewaySpec(cors_origins=("https://chat.example.org",))) as fleet:
        for method, path in (("GET", "/mesh/status"), ("POST", "/api/chat"), ("GET", f"/v1/models/{MODEL}")):
            answer = await ask(fleet, method, path, headers=headers)
            assert answer.status_code == status
            allowed = [headers["Origin"]] if "Origin" in headers and status == 200 else []
            assert answer.headers.get_list("Access-Control-Allow-Origin") == allowed, "the gateway's header, or none"
            assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_a_page_behind_a_nodes_own_port_is_not_of_this_machine(host: Host) -> None:
    async with serve(host) as server, serve_nodes((node("evil", server.url),)) as fleet:
        for name in ("127.0.0.1", "localhost", "[::1]"):
            theirs = {"Origin": f"http://{name}:{server.port}"}
            refused = await ask(fleet, "POST", "/api/chat", headers=theirs)
            assert refused.status_code == 403
            assert "Access-Control-Allow-Origin" not in refused.headers
            assert (await fleet.client.get("/mesh/status", headers=theirs)).status_code == 403
        assert host.asked == 0
        assert (await fleet.client.get("/mesh/status", headers={"Origin": fleet.gateway.url})).status_code == 200


async def test_a_websocket_is_not_opened(fleet: RunningGateway, host: Host) -> None:
    host.answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x02hi"
    asked = (
        f"GET /v1/models/{MODEL} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nX-GPUMesh-Timeout: 5\r\n"
    )
    for origin, status in ((b"Origin: http://evil.example\r\n", b"403"), (b"", b"50")):
        said = await send_raw(
            fleet.port, asked.encode() + origin + b"\r\n" + b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
        )
        assert said.startswith(b"HTTP/1.1 " + status)


async def test_with_a_key_pages_are_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_TEST_KEY", "sesame")
    async with serve_hosts(spec=GatewaySpec(api_key_env="BROWSER_TEST_KEY")) as fleet:
        key = {"Authorization": "Bearer sesame"}
        assert (await fleet.client.get("/mesh/status", headers=key)).status_code == 200
        checked(await fleet.client.get("/mesh/status"))
        script = {**key, "Sec-Fetch-Dest": "script"}
        assert (await fleet.client.get("/mesh/status", headers=script)).status_code == 403
