"""What the page at /ui is given, and who may change something. In a real browser: tests/real/test_page.py."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import gpumesh
from gpumesh.gateway.observe.recent_log import RecentLog
from gpumesh.state import Health
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import RunningGateway, send_raw, serve_hosts
from tests.http_clients import loopback_client

KEY = {"Authorization": "Bearer sesame"}
STATIC = Path(gpumesh.__file__).parent / "gateway" / "static"


@pytest.fixture
async def locked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningGateway]:
    monkeypatch.setenv("PAGE_TEST_KEY", "sesame")
    async with serve_hosts(spec=GatewaySpec(api_key_env="PAGE_TEST_KEY")) as running:
        yield running


async def read_events(fleet: RunningGateway, wanted: str, headers: dict[str, str] | None = None) -> AsyncIterator[Any]:
    """The documents of the events of one name."""
    async with fleet.client.stream("GET", "/mesh/events", headers=headers) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        event = ""
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event == wanted:
                yield json.loads(line.removeprefix("data: "))


async def first(fleet: RunningGateway, wanted: str, headers: dict[str, str] | None = None) -> Any:
    async with asyncio.timeout(20):
        async for document in read_events(fleet, wanted, headers):
            return document
    raise AssertionError(f"no event {wanted}")


async def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(fleet: RunningGateway) -> None:
    page = await fleet.client.get("/ui")
    assert page.headers["Content-Type"].startswith("text/html")
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"']+", page.text) == []
    assert re.findall(r"\s(?:src|href)=\"(?!#|data:,)", page.text) == [], "no file beside it"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        assert policy[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", page.text) is None, "only text is set"


def test_scripts_have_no_name_in_common_and_stay_short() -> None:
    """They share one scope: a second function of one name would silently replace the first."""
    names: list[str] = []
    for script in STATIC.glob("*.js"):
        text = script.read_text()
        assert text.startswith('"use strict";\n//'), f"{script.name} says what it is for"
        assert len(text.splitlines()) < 400
        names += re.findall(r"^(?:async )?(?:function\*?|const|let|class) ([A-Za-z_$]+)", text, re.MULTILINE)
        assert f'<script src="{script.name}"></script>' in (STATIC / "ui.html").read_text()
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))


async def test_the_stream_has_the_status_and_each_change(fleet: RunningGateway) -> None:
    assert await first(fleet, "hello") == {"writable": False, "key_set": False, "key": None, "log": False}
    live = await first(fleet, "live")
    assert (live["requests"], live["count"], live["recent"]["failed"]) == ([], 0, 0)
    async with asyncio.timeout(20):
        async for status in read_events(fleet, "status"):
            assert status["schema"] == "gpumesh.status/1"
            health = {node["name"]: node["health"] for node in status["nodes"]}
            if health["a"] == "healthy":
                fleet.mesh.drain("a")
            elif health["a"] == "draining":
                return


async def test_without_a_key_in_mesh_yaml_nothing_can_be_changed(fleet: RunningGateway) -> None:
    for action in ("drain", "resume", "reconnect"):
        answer = await fleet.client.post(f"/mesh/nodes/a/{action}")
        assert answer.status_code == 403
        assert "api_key_env" in answer.json()["error"]
    assert fleet.mesh.snapshot().node("a").health is Health.HEALTHY


async def test_with_a_key_everybody_gets_the_page_and_only_the_key_its_data(locked: RunningGateway) -> None:
    assert (await locked.client.get("/ui")).status_code == 200
    assert (await locked.client.get("/mesh/events")).status_code == 401
    assert (await locked.client.post("/mesh/nodes/a/drain")).status_code == 401
    for path in ("/mesh/history", "/mesh/requests", "/mesh/log"):
        assert (await locked.client.get(path)).status_code == 401
    expected = {"writable": True, "key_set": True, "key": "PAGE_TEST_KEY", "log": False}
    assert await first(locked, "hello", KEY) == expected


async def test_with_its_key_a_node_is_drained_and_resumed(locked: RunningGateway) -> None:
    async def act(action: str, node: str = "a") -> httpx.Response:
        return await locked.client.post(f"/mesh/nodes/{node}/{action}", headers=KEY)

    assert (await act("drain")).json() == {"node": "a", "done": "drain"}
    assert locked.mesh.snapshot().node("a").health is Health.DRAINING
    assert (await act("resume")).status_code == 200
    assert locked.mesh.snapshot().node("a").health is Health.HEALTHY
    assert (await act("reconnect")).status_code == 200
    assert (await act("drain", "nobody")).status_code == 404
    assert (await act("explode")).status_code == 404
    assert (await locked.client.get("/mesh/nodes/a/drain", headers=KEY)).status_code == 405


async def test_the_past_is_told_in_parts(fleet: RunningGateway) -> None:
    async def ask(query: str) -> Any:
        return (await fleet.client.get(f"/mesh/history{query}")).json()

    hour = await ask("")
    assert (hour["step_s"], hour["first"], hour["series"]["mesh"]["queued"]) == (15, hour["began"], [0.0])
    assert (await ask("?range=86400&after=0"))["step_s"] == 300
    for query in ("?range=x", "?range=1e9", "?range=nan", "?after=-5"):
        assert (await fleet.client.get(f"/mesh/history{query}")).status_code == 400, query


async def test_an_open_page_does_not_hold_up_the_end_of_the_gateway() -> None:
    loop = asyncio.get_running_loop()
    told_once = asyncio.Event()

    async def read(url: str) -> None:
        async with (
            loopback_client(base_url=url, timeout=20) as client,
            client.stream("GET", "/mesh/events") as response,
        ):
            async for line in response.aiter_lines():
                if line == "event: status":
                    told_once.set()

    async with serve_hosts() as fleet:
        reading = asyncio.create_task(read(fleet.gateway.url))
        await told_once.wait()
        began = loop.time()
    await reading
    assert loop.time() - began < fleet.gateway.drain_s / 2


async def test_a_page_whose_key_was_removed_loses_its_stream(
    locked: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGE_TEST_KEY", "another")  # as after an edit of mesh.yaml that names another key
    has_begun = asyncio.Event()

    async def follow() -> None:
        async for _ in read_events(locked, "status", KEY):
            has_begun.set()

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(follow())  # the stream must end, for the group ends with it
        await has_begun.wait()
        locked.gateway.apply(locked.gateway.read_guard(locked.mesh.topology))
    assert (await locked.client.get("/mesh/events", headers=KEY)).status_code == 401
    assert (await first(locked, "hello", {"Authorization": "Bearer another"}))["writable"]


async def test_the_log_is_told_where_it_is_kept(fleet: RunningGateway) -> None:
    assert (await fleet.client.get("/mesh/log")).status_code == 404
    recent = fleet.gateway._page._recent_log = RecentLog()
    for node in ("a", "b"):
        recent.handle(logging.makeLogRecord({"msg": f"about {node}", "levelname": "INFO", "node": node}))

    async def ask(query: str) -> list[str]:
        return [line["message"] for line in (await fleet.client.get(f"/mesh/log{query}")).json()["lines"]]

    assert await ask("") == ["about b", "about a"]
    assert await ask("?node=a&lines=9") == ["about a"]
    assert await ask("?lines=1") == ["about b"]
    assert (await fleet.client.get("/mesh/log?lines=501")).status_code == 400


async def test_a_head_request_for_the_stream_is_answered(fleet: RunningGateway) -> None:
    asked = "{} /mesh/events HTTP/1.1\r\nHost: localhost\r\nConnection: {}\r\n\r\n"
    answers = await send_raw(fleet.port, (asked.format("HEAD", "keep-alive") + asked.format("HEAD", "close")).encode())
    assert answers.count(b"Content-Type: text/event-stream\r\n") == answers.count(b"\r\n\r\n") == 2
