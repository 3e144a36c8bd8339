"""Which pages, hosts and keys the running gateway lets in, and that nothing of one client reaches another."""

from __future__ import annotations

import pytest

from gpumesh.lab.profile import Faults
from gpumesh.topology import GatewaySpec
from tests.gateway.fleet import (
    CHAT,
    MODEL,
    A,
    RunningGateway,
    send_raw,
    serve_hosts,
)

# -- browsers --------------------------------------------------------------------------------------------------------

PAGE = "https://chat.example.org"


async def test_a_page_on_the_list_may_read_answers_and_streams() -> None:
    async with serve_hosts(A, spec=GatewaySpec(cors_origins=(PAGE,))) as fleet:
        preflight_headers = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-stainless-os",
        }
        preflight = await fleet.client.options("/api/chat", headers=preflight_headers)
        assert preflight.status_code == 204
        assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "x-stainless-os" in preflight.headers["Access-Control-Allow-Headers"]
        streamed = await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": PAGE})
        assert streamed.headers["Access-Control-Allow-Origin"] == PAGE
        assert streamed.headers["Vary"] == "Origin"
        failed = await fleet.client.post("/api/chat", json={}, headers={"Origin": PAGE})
        assert failed.headers["Access-Control-Allow-Origin"] == PAGE, "a page must be able to read why"


async def test_a_preflight_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "k-12345")
    async with serve_hosts(A, spec=GatewaySpec(cors_origins=(PAGE,), api_key_env="GATEWAY_KEY")) as fleet:
        preflight_headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        assert (await fleet.client.options("/api/chat", headers=preflight_headers)).status_code == 204
        assert (await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": PAGE})).status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://[", "::"])
async def test_other_pages_may_not_even_ask(fleet: RunningGateway, origin: str) -> None:
    preflight_headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for answer in (
        await fleet.client.options("/api/chat", headers=preflight_headers),
        await fleet.client.post("/api/chat", json=CHAT, headers={"Origin": origin}),
        await fleet.client.get("/api/tags", headers={"Origin": origin}),
    ):
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert fleet.hosts["a"].counters.started == 0


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11430", "", "8.8.8.8"])
async def test_a_name_that_was_rebound_to_this_machine_gets_nothing(fleet: RunningGateway, host: str) -> None:
    answer = await send_raw(fleet.port, f"GET /api/tags HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert MODEL.encode() not in answer


# -- clients do not see each other ------------------------------------------------------------------------------------


async def test_nothing_that_a_client_sends_reaches_other_clients(fleet: RunningGateway) -> None:
    mark = "zyzzyva"
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=500, paths=("/api/generate",)))
    headers = {"X-GPUMesh-Session": mark, "X-GPUMesh-Node": mark, "Cookie": mark}
    await fleet.chat(mark, model=mark)
    await fleet.chat(mark, headers=headers)
    await fleet.chat(mark, headers={"X-GPUMesh-Session": mark})
    await fleet.client.post("/api/generate", json={"model": MODEL, "prompt": mark})
    await fleet.client.get(f"/{mark}", headers={"User-Agent": mark})
    await send_raw(fleet.port, f"{mark} {mark} {mark}\r\n\r\n".encode())
    answers = [
        await fleet.client.post("/api/generate", json={"model": MODEL, "prompt": "mine"}),
        await fleet.chat(model="other:1b"),
        await fleet.client.get("/mesh/status"),
        await fleet.client.get("/metrics"),
        await fleet.client.get("/healthz"),
        await fleet.client.get("/nowhere"),
    ]
    assert [mark in answer.text for answer in answers] == [False] * 6
