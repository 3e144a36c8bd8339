"""The page at /ui in a real headless Chromium, over the lab's hosts: live, for keyboards, without the outside.

One mesh and one browser context serve all tests; each test has a tab of its own.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gpumesh import config
from gpumesh.config.changed_file import read_snapshot
from gpumesh.daemon.reload.reloader import Reloader
from gpumesh.errors import GPUMeshError
from gpumesh.gateway.app import Gateway
from gpumesh.gateway.observe.recent_log import RecentLog
from gpumesh.gateway.page.web_page import CANCEL_REASON
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab
from gpumesh.mesh.mesh import Mesh
from tests.gateway.fleet import lines
from tests.http_clients import loopback_client
from tests.prerequisites import needs

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    needs("chromium"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>4090"
MODEL = profile.QWEN_7B.name
SLOW = {"tokens_per_s": 50.0, "answer_tokens": (1500, 1500)}
HOSTS = (
    profile.make_instant_host("one", **SLOW),
    replace(profile.make_instant_host("two", pull_s=0.5), gpus=(profile.make_gpu("two", name=HOSTILE),)),
)
KEY = "sesame"
GATEWAY = {"api_key_env": "PAGE_TEST_KEY"}
PATIENCE_MS = 20_000.0


@dataclass
class Served:
    lab: Lab
    mesh: Mesh
    gateway: Gateway
    context: Any
    log: RecentLog
    file: Path
    reloader: Reloader


@dataclass
class Tab:
    """A tab of the page, what it has asked for, and the errors in its console."""

    page: Any
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def card(self, name: str) -> Any:
        return self.page.get_by_role("article", name=name, exact=True)

    async def see(self, address: str, heading: str) -> None:
        """Shows a view by its address."""
        await self.page.evaluate("address => { location.hash = address }", address)
        await self.page.get_by_role("heading", name=heading, level=2, exact=True).wait_for()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    recent_log = RecentLog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGE_TEST_KEY", KEY)
        async with Lab(HOSTS, folder) as lab:
            file = lab.write_config(folder / "mesh.yaml", gateway=GATEWAY)
            async with Mesh(config.load(file)) as mesh, Gateway(mesh, recent_log=recent_log) as gateway:
                reloader = Reloader(mesh, file, read_snapshot(file))
                reloader.gateway = gateway
                await mesh.wait_first_report(20.0)
                context = await browser.new_context()
                try:
                    yield Served(lab, mesh, gateway, context, recent_log, file, reloader)
                finally:
                    await context.close()
                    gateway.drain_s = 0.1


@asynccontextmanager
async def opened(served: Served, *, url: str | None = None, key: str | None = KEY) -> AsyncIterator[Tab]:
    """A tab with the page, which knows the key."""
    tab = Tab(await served.context.new_page())
    page = tab.page
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: tab.asked.append(request.url))
    page.on("pageerror", lambda error: tab.errors.append(str(error)))
    page.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
    if key is not None:  # the storage of a tab: another one does not see it
        await page.add_init_script(f"localStorage.clear(); sessionStorage.setItem('gpumesh-key', '{key}')")
    try:
        await page.goto(f"{url or served.gateway.url}/ui")
        if key is not None:
            await tab.card("one").get_by_text("healthy").wait_for()
        yield tab
        own = url or served.gateway.url
        assert [asked for asked in tab.asked if not asked.startswith((own, "data:"))] == [], "nobody else is asked"
        # The routes of usage and of changes may be refused; anything else in the console is a fault of the page.
        assert [error for error in tab.errors if "Failed to load resource" not in error] == []
    finally:
        await page.close()


@pytest_asyncio.fixture(loop_scope="module")
async def tab(served: Served) -> AsyncIterator[Tab]:
    async with opened(served) as tab:
        yield tab


async def test_the_key_is_asked_for_and_explained(served: Served) -> None:
    async with opened(served, key=None) as tab:
        page = tab.page
        await page.get_by_role("heading", name="An API key is needed").wait_for()
        await page.get_by_text("gateway.api_key_env").wait_for()
        assert await page.locator("#key").evaluate("field => field === document.activeElement")
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await page.get_by_text("This key is not the right one").wait_for()
        await page.keyboard.type(KEY)
        await page.keyboard.press("Enter")
        await tab.card("one").get_by_text("healthy").wait_for()
        assert KEY not in "".join(tab.asked)
        await tab.see("#/connect", "Connect programs")
        await page.get_by_text("export OPENAI_BASE_URL=" + served.gateway.url + "/v1").wait_for()
        assert KEY not in await page.locator("main").inner_text()
        await page.get_by_role("button", name="Forget the key").click()
        await page.get_by_role("heading", name="An API key is needed").wait_for()


async def test_a_nodes_death_and_return_are_seen_live(served: Served, tab: Tab) -> None:
    page = tab.page
    await tab.card("two").get_by_text("healthy").wait_for()
    for title in ("GPU busy", "GPU memory in use", "Requests"):
        plot = page.get_by_role("img", name=title)
        await plot.locator("polyline").first.wait_for(state="attached")
        assert "no data yet" not in await plot.get_attribute("aria-label")
    await served.lab.host("one").kill()
    try:
        await tab.card("one").get_by_text("down").wait_for()
        await page.get_by_text("node-unreachable").wait_for()
        said = page.locator("#said")
        assert (await said.text_content()).startswith("one is down: ")
        assert await said.get_attribute("aria-live") == "polite"
        assert (await page.title()).startswith("1/2 up · ")
        assert await page.locator("#cards article").first.get_by_role("heading").inner_text() == "one", "faults first"
        await tab.see("#/nodes/one", "one")
        await page.locator("#view-node .badge", has_text="down").wait_for()
    finally:
        await served.lab.host("one").restart()
    await page.locator("#view-node .badge", has_text="healthy").wait_for()
    await page.keyboard.press("Escape")
    # What a host says is text, and nothing was asked of anybody but the gateway.
    assert await tab.card("two").locator("img, b").count() == 0
    assert HOSTILE in await tab.card("two").inner_text()
    assert (await page.title()).startswith("2/2 up · ")


async def test_a_request_is_followed_and_cancelled_live(served: Served, tab: Tab) -> None:
    page = tab.page
    await tab.see("#/requests", "Requests in flight")
    headers = {"Authorization": f"Bearer {KEY}", "X-GPUMesh-Client": "<b>alice", "X-GPUMesh-Node": "one"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    async with loopback_client(base_url=served.gateway.url, timeout=60, headers=headers) as client:
        asked = asyncio.create_task(client.post("/api/chat", json=body))
        row = page.get_by_role("row").filter(has_text="<b>alice")
        await row.get_by_text("writes").wait_for()
        tokens = row.locator(".c-tokens")
        await page.wait_for_function("cell => Number(cell.textContent) > 20", arg=await tokens.element_handle())
        text = await row.inner_text()
        assert MODEL in text
        assert " left" in text, "the forecast"
        assert await page.locator("#request-count").inner_text() == "1"
        await row.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog", name="Cancel this request?")
        await dialog.get_by_text("<b>alice asked one for " + MODEL).wait_for()
        await dialog.get_by_role("button", name="Cancel the request").click()
        answer = await asked
    assert lines(answer.text)[-1] == {"error": CANCEL_REASON}
    await page.get_by_text("Nothing is in flight").wait_for()
    assert await page.locator("#said").text_content() is not None


async def test_the_whole_page_by_keyboard(served: Served, tab: Tab) -> None:
    page, press = tab.page, tab.page.keyboard.press
    await press("?")
    await page.get_by_role("dialog", name="Keyboard").wait_for()
    await press("Escape")
    await press("t")
    table = page.get_by_role("table", name="Nodes")
    await table.wait_for()
    await table.get_by_role("button", name="Node", exact=True).focus()
    await press("Enter")
    await press("Enter")
    assert await table.get_by_role("columnheader", name="Node", exact=True).get_attribute("aria-sort") == "descending"
    await page.evaluate("document.activeElement.blur()")
    await press("j")
    assert await page.evaluate("document.activeElement.textContent") == "two"
    await press("Enter")
    await page.get_by_role("heading", name="two", level=2).wait_for()
    assert await page.evaluate("document.activeElement.textContent") == "two", "the heading of the new view"
    await page.get_by_role("button", name="drain two").focus()
    await press("Enter")
    await page.locator("#view-node .badge", has_text="draining").wait_for()
    await page.get_by_role("button", name="resume two").focus()
    await press("Enter")
    await page.locator("#view-node .badge", has_text="healthy").wait_for()
    await press("Escape")
    await table.wait_for()
    await press("3")
    await page.get_by_role("heading", name="Models", level=2).wait_for()
    await press("1")
    await page.evaluate("document.activeElement.blur()")
    await press("t")
    await tab.card("one").wait_for()
    assert await page.evaluate("localStorage.getItem('gpumesh-nodes')") == "cards"
    for role in ("banner", "navigation", "main"):
        assert await page.get_by_role(role).count() == 1


async def test_one_nodes_view(served: Served, tab: Tab) -> None:
    page = tab.page
    async for _ in served.mesh.chat(MODEL, "hello", node="two"):
        pass
    await tab.see("#/nodes/two", "two")
    view = page.locator("#view-node")
    await view.get_by_text("last forecast").wait_for()
    served.log.handle(logging.makeLogRecord({"msg": "<i>a line", "levelname": "WARNING", "node": "two"}))
    parts = (
        " way + ",
        "the last ",
        f"{MODEL} once",
        "driver 550.54.15",
        "/usr/local/bin/ollama runner",
        "Q4_K_M",
        HOSTILE,
    )
    for part in (*parts, "<i>a line"):
        await view.get_by_text(part).first.wait_for()
    plot = page.get_by_role("img", name="GPU busy")
    await plot.locator("polyline").first.wait_for(state="attached")
    await plot.hover()
    tip = view.locator(".tip").first
    await plot.focus()
    await page.keyboard.press("ArrowLeft")
    await tip.get_by_text("GPU 0").wait_for()
    assert re.search(r"\d\d:\d\d:\d\d.*GPU 0 \d+ %", (await tip.text_content()).replace("\n", " "))
    asked = len(tab.asked)
    await view.get_by_role("button", name="5 min", exact=True).click()
    async with page.expect_request(lambda request: "range=300&after=" in request.url):
        pass
    assert any("/mesh/history?range=300" in url for url in tab.asked[asked:])


async def test_models_are_pulled_loaded_unloaded_and_deleted(served: Served, tab: Tab) -> None:
    page = tab.page
    await tab.see("#/models", "Models")
    await page.get_by_label("Pull", exact=True).fill("llama3.1:8b")
    await page.get_by_label("to", exact=True).select_option("two")
    await page.get_by_role("button", name="Pull", exact=True).click()
    await page.locator(".pulls li").get_by_text("done").wait_for()
    await page.get_by_role("row").filter(has_text="llama3.1:8b").get_by_role("button").click()
    dialog = page.get_by_role("dialog", name="llama3.1:8b")
    copy = dialog.get_by_role("row").filter(has_text="two")
    await copy.get_by_role("button", name="Load").click()
    await copy.get_by_text("in memory").wait_for()
    await copy.get_by_role("button", name="Unload").click()
    await copy.get_by_text("on disk").wait_for()
    assert await dialog.get_by_role("button", name="Pull here llama3.1:8b on one").count() == 1
    await copy.get_by_role("button", name="Delete").click()
    await page.get_by_role("button", name="Delete it").click()
    await copy.get_by_text("not there").wait_for()
    await dialog.get_by_role("button", name="Close").click()
    assert await page.get_by_role("row").filter(has_text="llama3.1:8b").count() == 0


async def test_a_reload_and_problems_of_the_file_are_seen_live(served: Served, tab: Tab) -> None:
    page, file, said = tab.page, served.file, tab.page.locator("#said")
    text = file.read_text()
    place = page.get_by_role("region", name="mesh.yaml")
    try:
        file.write_text(text + "\n<b>nonsense: 1\n")
        with pytest.raises(GPUMeshError):
            await served.reloader.reload()
        await place.get_by_text("config-invalid").wait_for()
        line = len(text.splitlines()) + 2
        assert f"mesh.yaml:{line}" in (found := await place.inner_text()), found
        assert "<b>nonsense" in found
        served.lab.write_config(file, gateway=GATEWAY, nodes=[served.lab.host("one").node_entry()])
        await served.reloader.reload()
        await place.wait_for(state="hidden")
        await tab.card("two").wait_for(state="detached")
        assert await said.text_content() == "two is no node of this mesh any more"
        assert (await page.title()).startswith("1/1 up · ")
    finally:
        file.write_text(text)
        await served.reloader.reload()
    await tab.card("two").get_by_text("healthy").wait_for()


async def test_light_and_dark_and_narrow(served: Served, tab: Tab) -> None:
    page = tab.page
    grounds = []
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    await page.set_viewport_size({"width": 360, "height": 800})
    for address, heading in (
        ("#/requests", "Requests in flight"),
        ("#/models", "Models"),
        ("#/connect", "Connect programs"),
        ("#/nodes/two", "two"),
        ("#/", "Nodes"),
    ):
        await tab.see(address, heading)
        # Plots get their width in the next frame.
        await page.wait_for_function("() => document.documentElement.scrollWidth <= 360", timeout=5000)


async def test_read_only_without_a_key(served: Served) -> None:
    topology = served.mesh.topology
    spec = replace(topology.gateway, api_key_env=None)
    served.mesh.topology = replace(topology, gateway=spec)
    try:
        open_to_all = Gateway(served.mesh, port=0)
    finally:
        served.mesh.topology = topology
    async with open_to_all as gateway, opened(served, url=gateway.url) as tab:
        for address, heading in (("#/nodes/one", "one"), ("#/models", "Models"), ("#/connect", "Connect programs")):
            await tab.see(address, heading)
            names = await tab.page.get_by_role("button").all_inner_texts()
            assert not {"drain", "reconnect", "Pull"} & set(names), address
        await tab.page.get_by_text("this page is read-only").wait_for()
        gateway.drain_s = 0.1


async def test_the_page_comes_back_when_the_gateway_does(served: Served) -> None:
    async with Gateway(served.mesh, port=0) as first, opened(served, url=first.url) as tab:
        await tab.page.get_by_text("● live").wait_for()
        port = int(first.url.rpartition(":")[2])
        # A second one takes the first one's place at the same address, as after `gpumesh down` and `up -d`.
        await first.__aexit__(None, None, None)
        await tab.page.get_by_text("the gateway is away").wait_for()
        async with Gateway(served.mesh, port=port):
            await tab.page.get_by_text("● live").wait_for()
