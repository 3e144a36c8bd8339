"""Routes that change model stores, over several nodes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.topology import BackendKind
from tests.gateway.fleet import MODEL, A, RunningGateway, lines, node, quick_host, serve_hosts, serve_nodes
from tests.mesh.servers import Exchange, Script, serve, whole_response
from tests.tunnels.polling import wait_until

NEW = "new:1b"


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    async with serve_hosts() as made:
        yield made


def nodes_with(fleet: RunningGateway, model: str) -> set[str]:
    return {name for name, host in fleet.hosts.items() if model in host.engine.store}


async def take_away(fleet: RunningGateway, name: str) -> None:
    """The node's server is gone, and the mesh knows it."""
    await fleet.hosts[name].set_faults(Faults(refuse=True))
    await wait_until(lambda: name not in fleet.mesh.usable_nodes(), f"{name} is known to be away")


# -- pull ------------------------------------------------------------------------------------------------------------


async def test_a_pull_goes_to_all_nodes_and_its_progress_is_one(fleet: RunningGateway) -> None:
    answer = await fleet.client.post("/api/pull", json={"model": NEW})
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert answer.headers["X-GPUMesh-Node"] == "a, b"
    progress = lines(answer.text)
    assert [line["status"] for line in progress if "digest" not in line] == [
        "pulling manifest",
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    layers = [line for line in progress if "digest" in line]
    assert len({(line["digest"], line["total"]) for line in layers}) == 1, "one bar, of one length"
    shares = [line["completed"] for line in layers]
    assert shares == sorted(shares)
    assert shares[-1] == layers[0]["total"]
    assert nodes_with(fleet, NEW) == {"a", "b"}


async def test_a_pulled_model_can_be_used_at_once(fleet: RunningGateway) -> None:
    """Not when the next probe has come round."""
    for number in range(5):
        name = f"new{number}:1b"
        async with fleet.client.stream("POST", "/api/pull", json={"model": name}) as pulling:
            async for line in pulling.aiter_lines():
                if '"success"' in line:
                    break
        assert (await fleet.chat(model=name)).status_code == 200


async def test_a_pull_to_one_node(fleet: RunningGateway) -> None:
    answer = await fleet.client.post("/api/pull", json={"model": NEW}, headers={"X-GPUMesh-Node": "b"})
    assert lines(answer.text)[-1] == {"status": "success"}
    assert answer.headers["X-GPUMesh-Node"] == "b"
    assert nodes_with(fleet, NEW) == {"b"}


async def test_a_pull_without_a_stream(fleet: RunningGateway) -> None:
    answer = await fleet.client.post("/api/pull", json={"name": NEW, "stream": False})
    assert answer.json() == {"status": "success"}
    assert nodes_with(fleet, NEW) == {"a", "b"}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_pull_of_a_model_that_the_library_lacks(fleet: RunningGateway, stream: bool) -> None:
    answer = await fleet.client.post("/api/pull", json={"model": "missing:1b", "stream": stream})
    error = {"error": "pull model manifest: file does not exist"}
    if stream:
        assert lines(answer.text) == [{"status": "pulling manifest"}, error]
    else:
        assert (answer.status_code, answer.json()) == (500, error)


async def test_a_node_where_the_pull_fails_is_named_and_the_others_have_the_model(fleet: RunningGateway) -> None:
    await fleet.hosts["b"].set_faults(Faults(status=500, paths=("/api/pull",)))
    last = lines((await fleet.client.post("/api/pull", json={"model": NEW})).text)[-1]
    assert last["error"].startswith("pulled on a; not on b: model runner")
    whole = await fleet.client.post("/api/pull", json={"model": NEW, "stream": False})
    assert whole.status_code == 502
    assert nodes_with(fleet, NEW) == {"a"}
    assert (await fleet.chat(model=NEW)).status_code == 200


@pytest.mark.slow
async def test_when_all_nodes_refuse_their_own_error_is_answered(fleet: RunningGateway) -> None:
    for host in fleet.hosts.values():
        await host.set_faults(Faults(status=429, paths=("/api/pull",)))
    answer = await fleet.client.post("/api/pull", json={"model": NEW})
    assert (answer.status_code, answer.json()) == (429, {"error": "too many requests"})


@pytest.mark.slow
async def test_a_node_that_cannot_be_used_is_left_out_and_named(fleet: RunningGateway) -> None:
    await take_away(fleet, "b")
    progress = lines((await fleet.client.post("/api/pull", json={"model": NEW})).text)
    assert {"status": "b cannot be used now and is left out"} in progress
    assert progress[-1] == {"status": "success"}
    named = await fleet.client.post("/api/pull", json={"model": NEW}, headers={"X-GPUMesh-Node": "b"})
    assert named.status_code == 503


@pytest.mark.slow
async def test_a_pull_is_retried_when_the_connection_was_lost() -> None:
    async with serve_hosts(A, quick_host("b", pull_s=1.0)) as fleet:
        async with fleet.client.stream("POST", "/api/pull", json={"model": NEW}) as pulling:
            progress = []
            async for line in pulling.aiter_lines():
                progress += lines(line)
                if len(progress) == 4:
                    await fleet.hosts["b"].set_faults(Faults(refuse=True))
                    await fleet.hosts["b"].set_faults(Faults())
        assert progress[-1] == {"status": "success"}
        shares = [line["completed"] for line in progress if "completed" in line]
        assert shares == sorted(shares), "a bar does not go backwards"
        assert nodes_with(fleet, NEW) == {"a", "b"}


async def test_a_client_that_leaves_stops_the_pull() -> None:
    async with serve_hosts(quick_host("a", pull_s=60.0)) as fleet:
        async with fleet.client.stream("POST", "/api/pull", json={"model": NEW}) as pulling:
            await anext(pulling.aiter_lines())
        await wait_until(
            lambda: not [task for task in asyncio.all_tasks() if "/api/pull on" in task.get_name()], "all tasks end"
        )
        assert nodes_with(fleet, NEW) == set()


async def test_without_an_ollama_a_pull_is_refused() -> None:
    async with serve_hosts(kind=BackendKind.OPENAI) as fleet:
        answer = await fleet.client.post("/api/pull", json={"model": NEW})
        assert answer.status_code == 503
        assert "speaks this API" in answer.json()["error"]


# -- delete and copy -------------------------------------------------------------------------------------------------


async def test_delete_is_from_every_node_that_has_it(fleet: RunningGateway) -> None:
    answer = await fleet.client.request("DELETE", "/api/delete", json={"model": MODEL})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["X-GPUMesh-Node"] == "a, b"
    assert nodes_with(fleet, MODEL) == set()
    assert (await fleet.chat()).status_code == 404, "at once"
    again = await fleet.client.request("DELETE", "/api/delete", json={"model": MODEL})
    assert again.status_code == 404
    assert again.json()["error"].startswith(f"model '{MODEL}' not found")


async def test_delete_from_one_node(fleet: RunningGateway) -> None:
    answer = await fleet.client.request("DELETE", "/api/delete", json={"model": MODEL}, headers={"X-GPUMesh-Node": "a"})
    assert answer.status_code == 200
    assert nodes_with(fleet, MODEL) == {"b"}
    assert (await fleet.chat()).headers["X-GPUMesh-Node"] == "b"


async def test_deleting_a_model_that_is_already_gone_on_a_node_is_no_error(fleet: RunningGateway) -> None:
    del fleet.hosts["b"].engine.store[MODEL]
    answer = await fleet.client.request("DELETE", "/api/delete", json={"model": MODEL})
    assert (answer.status_code, answer.headers["X-GPUMesh-Node"]) == (200, "a")


@pytest.mark.slow
async def test_delete_names_a_node_out_of_reach_that_still_has_the_model(fleet: RunningGateway) -> None:
    await take_away(fleet, "b")
    answer = await fleet.client.request("DELETE", "/api/delete", json={"model": MODEL})
    assert answer.status_code == 502
    assert answer.json() == {"error": "deleted on a; not on b: it cannot be reached now"}
    assert nodes_with(fleet, MODEL) == {"b"}
    only = await fleet.client.request("DELETE", "/api/delete", json={"model": "nomic-embed-text"})
    assert only.status_code == 200, "b never had it"


async def test_a_copy_is_made_where_the_source_is(fleet: RunningGateway) -> None:
    for source, where in ((MODEL, {"a", "b"}), ("llama3.1:8b", {"b"})):
        answer = await fleet.client.post("/api/copy", json={"source": source, "destination": f"my-{source}"})
        assert answer.status_code == 200
        assert nodes_with(fleet, f"my-{source}") == where
        assert (await fleet.chat(model=f"my-{source}")).headers["X-GPUMesh-Node"] in where
    missing = await fleet.client.post("/api/copy", json={"source": "nobody:1b", "destination": "x"})
    assert missing.status_code == 404
    wrong = await fleet.client.post("/api/copy", json={"source": MODEL, "destination": ""})
    assert (wrong.status_code, wrong.json()) == (400, {"error": "destination is required"})


# -- create, push and blobs --------------------------------------------------------------------------------------------


async def test_create_is_where_its_base_is(fleet: RunningGateway) -> None:
    for base, where in ((MODEL, {"a", "b"}), ("llama3.1:8b", {"b"})):
        body = {"model": f"made-{base}", "from": base, "system": "You are brief."}
        answer = await fleet.client.post("/api/create", json=body)
        assert lines(answer.text)[-1] == {"status": "success"}
        assert nodes_with(fleet, f"made-{base}") == where
    nowhere = await fleet.client.post("/api/create", json={"model": "x", "from": "nobody:1b", "stream": False})
    assert (nowhere.status_code, nowhere.json()) == (404, {"error": "model 'nobody:1b' not found"})


async def test_push_is_from_one_node_that_has_it(fleet: RunningGateway) -> None:
    answer = await fleet.client.post("/api/push", json={"model": "llama3.1:8b"})
    assert answer.headers["X-GPUMesh-Node"] == "b"
    assert answer.status_code == 404, "the stand-in has no such route"
    assert (await fleet.client.post("/api/push", json={"model": "nobody:1b"})).status_code == 404


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def test_a_blob_is_there_when_it_is_everywhere(fleet: RunningGateway) -> None:
    data = b"weights" * 50_000
    path = f"/api/blobs/{digest_of(data)}"
    assert (await fleet.client.head(path)).status_code == 404
    fleet.hosts["a"].blobs.add(digest_of(data))
    half = await fleet.client.head(path)
    assert (half.status_code, half.headers["X-GPUMesh-Node"]) == (404, "a")
    before = fleet.hosts["a"].counters.http
    sent = await fleet.client.post(path, content=data)
    assert (sent.status_code, sent.headers["X-GPUMesh-Node"]) == (201, "a, b")
    assert digest_of(data) in fleet.hosts["b"].blobs
    assert fleet.hosts["a"].counters.http - before < 10, "a was asked, and not sent it again"
    assert (await fleet.client.head(path)).status_code == 200
    assert (await fleet.client.post(path, content=data)).status_code == 200, "nothing to do"


async def test_a_large_blob_streams_through(fleet: RunningGateway) -> None:
    piece = b"x" * 65536
    count = 200
    path = f"/api/blobs/{digest_of(piece * count)}"

    async def body() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    assert (await fleet.client.post(path, content=body())).status_code == 201
    assert (await fleet.client.head(path)).status_code == 200


async def test_a_blob_with_a_wrong_digest_is_refused(fleet: RunningGateway) -> None:
    answer = await fleet.client.post(f"/api/blobs/{digest_of(b'other')}", content=b"this")
    assert (answer.status_code, answer.json()) == (400, {"error": "digest mismatch"})
    assert (await fleet.client.post("/api/blobs/md5:123", content=b"this")).status_code == 400
    assert (await fleet.client.head("/api/blobs/..%2F..%2Fetc")).status_code == 400


async def test_a_node_that_drops_out_of_an_upload_does_not_hold_up_the_others() -> None:
    async def breaks_off(exchange: Exchange) -> None:
        if exchange.head.startswith(b"HEAD /api/blobs/"):
            await exchange.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif exchange.head.startswith(b"POST /api/blobs/"):
            await exchange.reader.read(1000)
            exchange.reset()
        else:
            kind = exchange.head.split()[1].rpartition(b"/")[2].decode()
            await exchange.send(
                whole_response(json.dumps({"version": "0.12.6"} if kind == "version" else {"models": []}).encode())
            )

    data = b"y" * 3_000_000
    path = f"/api/blobs/{digest_of(data)}"
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(SimOllama(A))
        other = await stack.enter_async_context(serve(breaks_off))
        nodes = (node("a", host.url), node("b", other.url))
        fleet = await stack.enter_async_context(serve_nodes(nodes, {"a": host}))
        answer = await fleet.client.post(path, content=data)
        assert answer.status_code == 502
        assert answer.json()["error"].startswith("stored on a; not on b: the upload broke off")
        assert digest_of(data) in host.blobs


async def test_a_node_that_cannot_say_whether_it_has_a_blob(fleet: RunningGateway) -> None:
    await fleet.hosts["b"].set_faults(Faults(status=500, paths=("/api/blobs",)))
    answer = await fleet.client.post(f"/api/blobs/{digest_of(b'x')}", content=b"x")
    assert answer.status_code == 502
    assert "b did not say" in answer.json()["error"]


async def test_create_from_files_goes_where_the_blobs_are(fleet: RunningGateway) -> None:
    data = b"weights"
    fleet.hosts["b"].blobs.add(digest_of(data))
    body = {"model": "filed:1b", "from": MODEL, "files": {"model.gguf": digest_of(data)}}
    answer = await fleet.client.post("/api/create", json=body)
    assert answer.headers["X-GPUMesh-Node"] == "b"
    wrong = {**body, "files": {"model.gguf": "../../tags"}}
    assert (await fleet.client.post("/api/create", json=wrong)).status_code == 400


# -- one node that talks nonsense ------------------------------------------------------------------------------------


def nonsense(body: bytes, *, blobs: bytes = b"418 I'm a teapot") -> Script:
    """An Ollama with MODEL whose answers to what changes its store are these."""

    async def script(exchange: Exchange) -> None:
        method, path = exchange.head.split(b" ")[:2]
        if path in (b"/api/version", b"/api/tags", b"/api/ps"):
            models = [] if path == b"/api/ps" else [{"name": MODEL}]
            await exchange.send(whole_response(json.dumps({"version": "0.12.6", "models": models}).encode()))
        elif method == b"HEAD":
            await exchange.send(b"HTTP/1.1 " + blobs + b"\r\nContent-Length: 0\r\n\r\n")
        else:
            await exchange.send(body)

    return script


@asynccontextmanager
async def with_nonsense(body: bytes) -> AsyncIterator[RunningGateway]:
    async with SimOllama(A) as host, serve(nonsense(body)) as other:
        nodes = (node("a", host.url), node("b", other.url))
        async with serve_nodes(nodes, {"a": host}) as fleet:
            yield fleet


NDJSON = "application/x-ndjson"


@pytest.mark.parametrize(
    "body",
    [
        whole_response(b"null\n[]\n5\nNaN\n{\n" + b"[" * 100_000, kind=NDJSON),
        whole_response(b'{"status":5}\n{"status":"\\ud800","total":NaN}\n{"status":"success"}\n', kind=NDJSON),
        whole_response(
            b'{"status":"x","digest":"d","total":1e999,"completed":-5}\n{"error":{"a":["\\ud800"]}}', kind=NDJSON
        ),
        whole_response(
            b"".join(b'{"status":"%d","digest":"%d","total":%d}\n' % (n, n, 10**30 + n) for n in range(5000))
        ),
        whole_response(b"<html>", status="418 I'm a teapot", kind="text/html"),
        whole_response(b'{"error":NaN,"x":"\\ud800"}', status="400 Bad"),
    ],
)
async def test_a_pull_beside_nonsense(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumesh.mesh.models.fleet_store.MAX_PULL_ATTEMPTS", 2)
    async with with_nonsense(body) as fleet:
        answer = await fleet.client.post("/api/pull", json={"model": NEW})
        assert nodes_with(fleet, NEW) == {"a"}
        progress = [json.loads(line, parse_constant=pytest.fail) for line in answer.text.splitlines()]
        json.dumps(progress, ensure_ascii=False).encode()
        assert any(line.get("status") == "success" or "pulled on a" in line.get("error", "") for line in progress)
        assert {"pulling manifest"} <= {line.get("status") for line in progress}


@pytest.mark.parametrize(
    "body",
    [
        whole_response(b"not found", status="404 Not Found", kind="text/plain"),
        whole_response(b'{"error":"\\ud800","x":NaN,"y":[[[[[[[[1]]]]]]]]}', status="404 Not Found"),
        whole_response(b"\xff" * 3_000_000, status="599 What"),
        whole_response(b"[" * 100_000),
    ],
)
async def test_a_copy_beside_nonsense_is_answered_in_json(body: bytes) -> None:
    async with with_nonsense(body) as fleet:
        for headers in ({}, {"X-GPUMesh-Node": "b"}):
            call = {"source": MODEL, "destination": "copied:1b"}
            answer = await fleet.client.post("/api/copy", json=call, headers=headers)
            assert len(answer.content) < 1 << 16
            if answer.content:
                document = json.loads(answer.content, parse_constant=pytest.fail)
                json.dumps(document, ensure_ascii=False).encode()
                assert isinstance(document["error"], str)
        assert "copied:1b" in fleet.hosts["a"].engine.store


async def test_a_blob_beside_nonsense() -> None:
    data = b"weights"
    path = f"/api/blobs/{digest_of(data)}"
    async with with_nonsense(whole_response(b"{}")) as fleet:
        lacks = await fleet.client.head(path)
        assert (lacks.status_code, lacks.headers["X-GPUMesh-Node"]) == (404, "")
        progress = await fleet.client.post(path, content=data)
        assert progress.status_code == 502
        assert progress.json()["error"].startswith("stored on a; not on b: b did not say")
        assert digest_of(data) in fleet.hosts["a"].blobs
        has = await fleet.client.head(path)
        assert (has.status_code, has.headers["X-GPUMesh-Node"]) == (200, "a")
        body = {"model": "filed:1b", "files": {"model.gguf": digest_of(data)}}
        made = await fleet.client.post("/api/create", json=body)
        assert made.headers["X-GPUMesh-Node"] == "a"
        assert (await fleet.client.head(path, headers={"X-GPUMesh-Node": "b"})).status_code == 502
