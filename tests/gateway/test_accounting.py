"""What metrics, access log and status say of a request is what happened to it, also if it got no answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.gateway.observe.access_log import AccessLog
from gpumesh.gateway.observe.metrics import MIN_WAIT_S
from tests.gateway.fleet import RunningGateway, lines, metric, node, serve_nodes
from tests.mesh.meshes import MODEL, ollama_script
from tests.mesh.servers import Exchange, chunk, chunked_head, serve, whole_response
from tests.tunnels.polling import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "stream": False}
Script = Callable[[Exchange], Awaitable[None]]


@dataclass
class Ledger:
    """A gateway, and what it has written about its requests."""

    running: RunningGateway
    access_log: AccessLog
    path: Path

    async def count(self, **labels: str) -> float:
        """The requests with these labels in the metrics."""
        text = (await self.running.client.get("/metrics")).text
        return metric(text, "gpumesh_requests_total", **labels)

    async def total(self, route: str) -> float:
        return await self.count(route=route)

    def last_entry(self) -> dict[str, Any]:
        """The last line of the access log, but for those about the metrics."""
        self.access_log.flush()
        entries = [entry for entry in lines(self.path.read_text()) if entry["path"] != "/metrics"]
        return dict(entries[-1])

    def counters(self) -> tuple[int, int, int]:
        counters = self.running.mesh.request_counters
        return counters.served, counters.failed, counters.cancelled


@asynccontextmanager
async def serve_ledger(tmp_path: Path, *scripts: Script) -> AsyncIterator[Ledger]:
    """A gateway over a server for each script. The nodes are asked in this order, one request at a time."""
    async with AsyncExitStack() as stack:
        nodes = []
        for place, (name, script) in enumerate(zip("abc", scripts, strict=False)):
            server = await stack.enter_async_context(serve(ollama_script(script)))
            nodes.append(replace(node(name, server.url, max_parallel=1), weight=0.001**place))
        path = tmp_path / "access.jsonl"
        access_log = AccessLog(path)
        running = await stack.enter_async_context(serve_nodes(tuple(nodes), access_log=access_log))
        yield Ledger(running, access_log, path)


def answer_with_status(status: int, body: bytes = b'{"error":"no"}') -> Script:
    async def answer(exchange: Exchange) -> None:
        await exchange.send(whole_response(body, status=f"{status} X"))

    return answer


async def hang_up(exchange: Exchange) -> None:
    exchange.close()


# -- model stores ------------------------------------------------------------------------------------------------------


def follow(*documents: dict[str, Any]) -> Script:
    """The progress of a pull, a push or a create."""
    body = b"".join(json.dumps(document).encode() + b"\n" for document in documents)

    async def answer(exchange: Exchange) -> None:
        await exchange.send(whole_response(body, kind="application/x-ndjson"))

    return answer


FAILS = follow({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})
SUCCEEDS = follow({"status": "pulling manifest"}, {"status": "success"})
STORE_REQUESTS = {
    "/api/pull": {"model": "x"},
    "/api/push": {"model": MODEL},
    "/api/create": {"model": "x", "from": MODEL},
}


@pytest.mark.parametrize("path", STORE_REQUESTS)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_operation_on_a_store_that_fails_counts_as_failed(path: str, stream: bool, tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, FAILS) as ledger:
        response = await ledger.running.client.post(path, json={**STORE_REQUESTS[path], "stream": stream})
        assert "does not exist" in response.text
        assert await ledger.count(route=path, outcome="failed", code=str(response.status_code)) == 1
        assert await ledger.total(path) == 1
        assert ledger.last_entry()["outcome"] == "failed"


async def test_a_pull_that_fails_on_one_of_two_nodes_counts_as_failed_and_one_that_succeeds_as_served(
    tmp_path: Path,
) -> None:
    async with serve_ledger(tmp_path, FAILS, SUCCEEDS) as ledger:
        for name, outcome in ((None, "failed"), ("b", "served")):
            headers = {} if name is None else {"X-GPUMesh-Node": name}
            response = await ledger.running.client.post("/api/pull", json={"model": "x"}, headers=headers)
            assert response.status_code == 200, "the stream had begun"
            assert await ledger.count(route="/api/pull", outcome=outcome) == 1
        assert await ledger.total("/api/pull") == 2


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/copy", {"source": MODEL, "destination": "n"}),
        ("DELETE", "/api/delete", {"model": MODEL}),
    ],
)
async def test_a_change_of_a_store_that_fails_counts_as_failed(
    method: str, path: str, body: dict[str, Any], tmp_path: Path
) -> None:
    async with serve_ledger(tmp_path, answer_with_status(500), answer_with_status(200, b"")) as ledger:
        response = await ledger.running.client.request(method, path, json=body)
        assert response.status_code == 502
        assert await ledger.count(route=path, outcome="failed", code="502") == 1
        assert await ledger.total(path) == 1


# -- answers that are errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 429, 500, 501, 502, 507, 520, 524, 529, 530])
async def test_a_failure_of_a_server_that_is_passed_on_is_not_served(status: int, tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, answer_with_status(status)) as ledger:
        response = await ledger.running.client.post("/api/chat", json=CHAT, headers={"X-GPUMesh-Timeout": "0.2"})
        code = str(response.status_code)
        assert code in (str(status), "504"), "a busy server is asked again until the deadline"
        assert await ledger.count(outcome="failed", code=code, node="a", model=MODEL, route="/api/chat") == 1
        assert await ledger.total("/api/chat") == 1
        assert ledger.counters() == (0, 1, 0)


async def test_a_mistake_of_the_client_is_an_answer(tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, answer_with_status(400)) as ledger:
        assert (await ledger.running.client.post("/api/chat", json=CHAT)).status_code == 400
        assert await ledger.count(outcome="served", code="400", node="a", model=MODEL) == 1
        assert ledger.counters() == (1, 0, 0)


# -- requests without an answer ----------------------------------------------------------------------------------------


async def test_a_request_that_every_node_failed_names_the_last_node_and_all_attempts(tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, hang_up, hang_up) as ledger:
        response = await ledger.running.client.post("/api/chat", json=CHAT)
        assert response.status_code == 503
        assert (response.headers["X-GPUMesh-Node"], response.headers["X-GPUMesh-Attempts"]) == ("b", "2")
        assert await ledger.count(outcome="failed", code="503", node="b", model=MODEL, route="/api/chat") == 1
        entry = ledger.last_entry()
        assert (entry["node"], entry["model"], entry["attempts"], entry["outcome"]) == ("b", MODEL, 2, "failed")
        assert entry["queue_ms"] is not None


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "in the answer"])
async def test_a_request_that_is_cancelled_in_flight_names_its_node_and_model(begun: bool, tmp_path: Path) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def hang(exchange: Exchange) -> None:
        if begun:
            await exchange.send(chunked_head() + chunk(b'{"message":{"content":"x"},"done":false}\n'))
        asked.set()
        await exchange.wait_client_gone()
        exchange.closed = True
        gone.set()

    async with serve_ledger(tmp_path, hang) as ledger:
        sending = asyncio.create_task(ledger.running.client.post("/api/chat", json={**CHAT, "stream": True}))
        await asked.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await gone.wait()
        await wait_until(lambda: ledger.counters() == (0, 0, 1), "it has ended")
        assert await ledger.count(outcome="cancelled", node="a", model=MODEL, route="/api/chat") == 1
        assert await ledger.total("/api/chat") == 1
        entry = ledger.last_entry()
        assert (entry["node"], entry["model"], entry["attempts"], entry["outcome"]) == ("a", MODEL, 1, "cancelled")
        assert ledger.running.mesh.snapshot().nodes[0].load.cancelled == 1


async def test_a_request_that_is_cancelled_in_the_queue_has_waited_for_its_model(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await go_on.wait()
        await exchange.send(whole_response(b'{"message":{"content":"x"},"done":true}'))

    async with serve_ledger(tmp_path, answer) as ledger:
        client, mesh = ledger.running.client, ledger.running.mesh
        first = asyncio.create_task(client.post("/api/chat", json=CHAT))
        await wait_until(lambda: mesh.in_flight == 1, "the node is busy")
        waits = asyncio.create_task(client.post("/api/chat", json=CHAT))
        await wait_until(lambda: mesh.snapshot().gateway.queued == 1, "the second waits")
        await wait_until(lambda: mesh.snapshot().gateway.waiting[0].waited_s >= MIN_WAIT_S, "for long enough")
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        await wait_until(lambda: ledger.counters() == (0, 0, 1), "it has left")
        assert await ledger.count(outcome="cancelled", node="", model=MODEL, route="/api/chat") == 1
        entry = ledger.last_entry()
        assert (entry["node"], entry["attempts"], entry["outcome"]) == (None, 0, "cancelled")
        assert entry["queue_ms"] >= MIN_WAIT_S * 1000.0
        text = (await client.get("/metrics")).text
        assert metric(text, "gpumesh_queue_wait_seconds_count", priority="normal") == 1, (
            "also those who gave up have waited"
        )
        go_on.set()
        assert (await first).status_code == 200


async def test_a_request_whose_deadline_passes_names_its_node(tmp_path: Path) -> None:
    async def hang(exchange: Exchange) -> None:
        await exchange.wait_client_gone()
        exchange.closed = True

    async with serve_ledger(tmp_path, hang) as ledger:
        headers = {"X-GPUMesh-Timeout": "0.05"}
        response = await ledger.running.client.post("/api/chat", json=CHAT, headers=headers)
        assert (response.status_code, response.headers["X-GPUMesh-Node"]) == (504, "a")
        assert await ledger.count(outcome="failed", code="504", node="a", model=MODEL) == 1


async def test_a_name_that_a_client_makes_up_is_no_label(tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, hang_up) as ledger:
        for number in range(3):
            response = await ledger.running.client.post("/api/chat", json={**CHAT, "model": f"made-up-{number}"})
            assert response.status_code == 404
            assert "X-GPUMesh-Node" not in response.headers
        assert await ledger.count(outcome="refused", code="404", node="", model="") == 3


async def test_a_request_that_moved_on_counts_for_the_node_that_answered_and_has_both_attempts(tmp_path: Path) -> None:
    async with serve_ledger(tmp_path, answer_with_status(502), answer_with_status(200, b'{"done":true}')) as ledger:
        response = await ledger.running.client.post("/api/chat", json=CHAT)
        assert (response.status_code, response.headers["X-GPUMesh-Attempts"]) == (200, "2")
        assert await ledger.count(outcome="served", code="200", node="b") == 1
        assert ledger.last_entry()["attempts"] == 2
