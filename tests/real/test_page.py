"""The page at /ui in a real headless Chromium, over the lab's hosts: live, for keyboards, without the outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh import config
from gpumesh.gateway.app import Gateway
from gpumesh.lab import profile
from gpumesh.lab.lab import Lab
from gpumesh.mesh.mesh import Mesh
from tests.prerequisites import needs

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    needs("chromium"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>4090"
HOSTS = (
    profile.make_instant_host("one"),
    replace(profile.make_instant_host("two"), gpus=(profile.make_gpu("two", name=HOSTILE),)),
)
PATIENCE_MS = 20_000.0


@dataclass
class Open:
    page: Any
    lab: Lab
    mesh: Mesh
    gateway: Gateway
    asked: list[str]
    closed: Callable[[], Awaitable[None]]
    """Ends the gateway."""


@asynccontextmanager
async def opened(browser: Any, folder: Path, **gateway: Any) -> AsyncIterator[Open]:
    async with Lab(HOSTS, folder) as lab:
        file = lab.write_config(folder / "mesh.yaml", gateway=gateway)
        async with Mesh(config.load(file)) as mesh, AsyncExitStack() as serving:
            served = await serving.enter_async_context(Gateway(mesh))
            await mesh.wait_first_report(20.0)
            context = await browser.new_context()
            try:
                page = await context.new_page()
                page.set_default_timeout(PATIENCE_MS)
                asked: list[str] = []
                page.on("request", lambda request: asked.append(request.url))
                await page.goto(f"{served.url}/ui")
                yield Open(page, lab, mesh, served, asked, serving.aclose)
            finally:
                await context.close()


def card(page: Any, name: str) -> Any:
    return page.get_by_role("article", name=name, exact=True)


async def test_a_nodes_death_and_return_are_seen_live(browser: Any, tmp_path: Path) -> None:
    async with opened(browser, tmp_path) as seen:
        page = seen.page
        await card(page, "one").get_by_text("healthy").wait_for()
        await card(page, "two").get_by_text("healthy").wait_for()
        for title in ("GPU busy", "GPU memory in use", "Requests"):
            plot = page.get_by_role("img", name=title)
            assert "nothing known yet" not in await plot.get_attribute("aria-label")
            assert await plot.locator("polyline").count() >= 1
        await seen.lab.host("one").kill()
        await card(page, "one").get_by_text("down").wait_for()
        await page.get_by_text("node-unreachable").wait_for()
        said = page.locator("#said")
        assert (await said.text_content()).startswith("one is down: ")
        assert await said.get_attribute("aria-live") == "polite"
        assert await page.title() == "1/2 up · gpumesh"
        await card(page, "two").get_by_text("healthy").wait_for()
        await seen.lab.host("one").restart()
        await card(page, "one").get_by_text("healthy").wait_for()
        # What a host says is text, and nothing was asked of anybody but the gateway.
        assert await card(page, "two").locator("img, b").count() == 0
        assert HOSTILE in await card(page, "two").inner_text()
        assert await page.title() == "2/2 up · gpumesh"
        assert {url.removeprefix(seen.gateway.url) for url in seen.asked} <= {"/ui", "/mesh/events", "data:,"}


async def test_forecasts_and_loads_are_shown(browser: Any, tmp_path: Path) -> None:
    async with opened(browser, tmp_path) as seen:
        for name in ("one", "two"):
            async for _ in seen.mesh.chat(profile.QWEN_7B.name, "hello", node=name):
                pass
            await card(seen.page, name).get_by_text("last forecast").wait_for()
            text = await card(seen.page, name).inner_text()
            assert " way + " in text
            assert "1 in the last 5 s" in text, text
            assert "qwen2.5:7b once" in text


async def test_read_only_without_a_key(browser: Any, tmp_path: Path) -> None:
    async with opened(browser, tmp_path) as seen:
        await card(seen.page, "one").get_by_text("healthy").wait_for()
        assert await seen.page.get_by_role("button").count() == 0


async def test_by_keyboard_with_a_key(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGE_TEST_KEY", "sesame")
    async with opened(browser, tmp_path, api_key_env="PAGE_TEST_KEY") as seen:
        page = seen.page
        await page.get_by_text("an API key is needed").wait_for()
        await page.get_by_label("API key").focus()
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await page.get_by_text("this key is not the right one").wait_for()
        await page.keyboard.type("sesame")
        await page.keyboard.press("Enter")
        await card(page, "one").get_by_text("healthy").wait_for()
        await page.get_by_role("button", name="drain one").focus()
        await page.keyboard.press("Enter")
        await card(page, "one").get_by_text("draining").wait_for()
        await page.get_by_role("button", name="resume one").focus()
        await page.keyboard.press("Enter")
        await card(page, "one").get_by_text("healthy").wait_for()
        assert "sesame" not in "".join(seen.asked)


async def test_light_and_dark_and_narrow(browser: Any, tmp_path: Path) -> None:
    async with opened(browser, tmp_path) as seen:
        page = seen.page
        await card(page, "one").get_by_text("healthy").wait_for()
        grounds = []
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds[0] != grounds[1]
        await page.set_viewport_size({"width": 360, "height": 800})
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing to scroll sideways"


async def test_the_page_comes_back_when_the_gateway_does(browser: Any, tmp_path: Path) -> None:
    async with opened(browser, tmp_path) as seen:
        await seen.page.get_by_text("● live").wait_for()
        port = int(seen.gateway.url.rpartition(":")[2])
        # A second one takes the first one's place at the same address, as after `gpumesh down` and `up -d`.
        await seen.closed()
        await seen.page.get_by_text("the gateway is away").wait_for()
        async with Gateway(seen.mesh, port=port):
            await seen.page.get_by_text("● live").wait_for()
