"""``/v1/batches`` over HTTP: what a batch is in OpenAI's API at each status, pages, owners, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.batches.base import BatchStore
from gpumesh.batches.validation import validate_batch
from gpumesh.batches.values import Batch, BatchCounts, BatchStatus, LineError, NewBatch, Result
from gpumesh.gateway.batches import batch_routes
from gpumesh.gateway.batches.documents import describe_batch, format_window, read_metadata, read_window
from gpumesh.gateway.batches.endpoints import is_batch_endpoint
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.lab.profile import QWEN_7B
from gpumesh.topology import GatewaySpec
from tests.gateway.batches.serving import serve_batches
from tests.gateway.fleet import MODEL, RunningGateway, quick_host
from tests.gateway.test_key_limits import bearer, key

CHAT_PATH = "/v1/chat/completions"
Served = tuple[RunningGateway, BatchStore]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("batches")
    spec = GatewaySpec(keys=(key("ann"), key("bob", models=("no-model",))))
    async with serve_batches(folder, quick_host("a", models=(QWEN_7B,)), spec=spec) as made:
        yield made


def line(name: str, **changes: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": CHAT_PATH, "body": {"model": MODEL, "messages": []}, **changes}


async def upload(served: Served, *lines: object, owner: str = "ann") -> str:
    content = "".join(json.dumps(line) + "\n" for line in lines)
    reply = await served[0].client.post(
        "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}, headers=bearer(owner)
    )
    return str(reply.json()["id"])


async def create(served: Served, file_id: str, *, owner: str = "ann", **changes: Any) -> Any:
    body = {"input_file_id": file_id, "endpoint": CHAT_PATH, "completion_window": "24h", **changes}
    return await served[0].client.post("/v1/batches", content=json.dumps(body), headers=bearer(owner))


async def get(served: Served, path: str, owner: str = "ann") -> Any:
    return (await served[0].client.get(path, headers=bearer(owner))).json()


async def finish(store: BatchStore, batch_id: str, *, failed: int) -> None:
    """Records results of all requests, of which so many fail."""
    await store.begin_work("w")
    await validate_batch(store, batch_id)
    claims = [claim for claim in await store.claim("w", 100, lease_s=60.0) if claim.batch_id == batch_id]
    results = [Result(claim, b'{"number":%d}' % number, number < failed) for number, claim in enumerate(claims)]
    await store.record("w", results)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_batch_from_its_creation_to_its_results(served: Served) -> None:
    file_id = await upload(served, line("a"), line("b"), "wrong", line("c"))
    created = (await create(served, file_id, metadata={"for": "tests"})).json()
    assert created["status"] == "validating"
    assert created["completion_window"] == "24h"
    assert created["expires_at"] - created["created_at"] == 86400
    assert created["metadata"] == {"for": "tests"}
    assert created["output_file_id"] is created["error_file_id"] is created["errors"] is None
    conflict = await served[0].client.delete(f"/v1/files/{file_id}", headers=bearer("ann"))
    assert (conflict.status_code, conflict.headers["X-Should-Retry"]) == (409, "false")
    await finish(served[1], created["id"], failed=1)
    batch = await get(served, f"/v1/batches/{created['id']}")
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert [error["line"] for error in batch["errors"]["data"]] == [3]
    assert batch["completed_at"] >= batch["in_progress_at"] >= batch["created_at"]
    output = await served[0].client.get(f"/v1/files/{batch['output_file_id']}/content", headers=bearer("ann"))
    errors = await served[0].client.get(f"/v1/files/{batch['error_file_id']}/content", headers=bearer("ann"))
    assert (output.text, errors.text) == ('{"number":1}\n{"number":2}\n', '{"number":0}\n')
    file = await get(served, f"/v1/files/{batch['output_file_id']}")
    assert (file["bytes"], file["purpose"]) == (len(output.content), "batch_output")
    listed = await get(served, "/v1/files?purpose=batch_output")
    assert [file["id"] for file in listed["data"]] == [batch["output_file_id"], batch["error_file_id"]]
    second = await get(served, f"/v1/files?purpose=batch_output&limit=1&after={batch['output_file_id']}")
    assert ([file["id"] for file in second["data"]], second["has_more"]) == ([batch["error_file_id"]], False)
    kept = await served[0].client.delete(f"/v1/files/{batch['output_file_id']}", headers=bearer("ann"))
    assert kept.status_code == 409
    assert f"gpumesh batch rm {batch['id']}" in kept.json()["error"]["message"]
    for path in (f"/v1/files/{batch['output_file_id']}", f"/v1/batches/{batch['id']}"):
        assert (await get(served, path, "bob"))["error"]["type"] == "not_found_error"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_batch_is_cancelled_once(served: Served) -> None:
    batch_id = (await create(served, await upload(served, line("a")))).json()["id"]
    cancel = f"/v1/batches/{batch_id}/cancel"
    assert (await served[0].client.post(cancel, headers=bearer("bob"))).status_code == 404
    for _ in range(2):
        cancelled = await served[0].client.post(cancel, headers=bearer("ann"))
        assert cancelled.json()["status"] in ("cancelling", "cancelled")
    await served[1].settle()
    assert (await get(served, f"/v1/batches/{batch_id}"))["status"] == "cancelled"
    done = (await create(served, await upload(served, line("a")))).json()["id"]
    await finish(served[1], done, failed=0)
    late = await served[0].client.post(f"/v1/batches/{done}/cancel", headers=bearer("ann"))
    assert late.status_code == 409
    assert "status completed" in late.json()["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_batches_are_listed_page_by_page(served: Served) -> None:
    file_id = await upload(served, line("a"), owner="bob")
    made = [(await create(served, file_id, owner="bob")).json()["id"] for _ in range(5)]
    first = await get(served, "/v1/batches?limit=3", "bob")
    ids = [batch["id"] for batch in first["data"]]
    assert first["has_more"] is True
    second = await get(served, f"/v1/batches?limit=3&after={ids[-1]}", "bob")
    assert second["has_more"] is False
    ids += [batch["id"] for batch in second["data"]]
    assert sorted(ids) == sorted(made)
    assert (await served[0].client.get("/v1/batches?limit=101", headers=bearer("bob"))).status_code == 400


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_no_batch_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = await upload(served, line("a"))
    bobs_file = await upload(served, line("a"), owner="bob")
    for changes, reason in (
        ({"endpoint": "prompt"}, "no route of a batch"),
        ({"endpoint": None}, "endpoint is required"),
        ({"endpoint": "/v1/batches"}, "no route of a batch"),
        ({"input_file_id": 1}, "input_file_id is required"),
        ({"input_file_id": "file-none"}, "there is no file"),
        ({"input_file_id": bobs_file}, "there is no file"),
        ({"completion_window": "1s"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"input_file_id": "\ud800"}, "no id"),
        ({"input_file_id": "../a"}, "no id"),
        ({"metadata": {"a": "\ud800"}}, "no Unicode"),
    ):
        reply = await create(served, file_id, **changes)
        assert reply.status_code == 400, changes
        assert reason in reply.json()["error"]["message"]
    post = served[0].client.post
    assert (await post("/v1/batches", content=b"[]", headers=bearer("ann"))).status_code == 400
    for size in (70_000, 700_000):
        assert (await post("/v1/batches", content=b"[" * size, headers=bearer("ann"))).status_code == 413
    assert (await post("/v1/batches/batch_none/cancel", headers=bearer("ann"))).status_code == 404
    assert (await post("/v1/batches/batch_none", headers=bearer("ann"))).status_code == 405
    assert (await served[0].client.get("/v1/batches/a/cancel", headers=bearer("ann"))).status_code == 405
    monkeypatch.setattr(batch_routes, "MAX_OPEN_BATCHES", 0)
    full = await create(served, file_id)
    assert (full.status_code, full.headers["X-Should-Retry"]) == (429, "false")


async def test_without_a_store_there_are_no_such_routes(fleet: RunningGateway) -> None:
    for path in ("/v1/files", "/v1/batches", "/v1/files/a", "/v1/batches/a"):
        assert (await fleet.client.get(path)).status_code == 404


@pytest.mark.parametrize("status", BatchStatus)
def test_each_status_has_the_time_of_openai(status: BatchStatus) -> None:
    batch = Batch(
        "batch_1",
        NewBatch(CHAT_PATH, "file-1"),
        status,
        created_at=10.9,
        expires_at=86410.9,
        counts=BatchCounts(output_bytes=5),
        in_progress_at=11.5,
        cancelling_at=12.5,
        ended_at=13.5 if status.has_ended else None,
        errors=(LineError(0, "empty_file", "the file is empty"),),
    )
    document = describe_batch(batch)
    ended = {name: document[name] for name in ("completed_at", "failed_at", "expired_at", "cancelled_at")}
    assert ended == {name: 13 if name == f"{status}_at" else None for name in ended}
    assert (document["output_file_id"] is not None) == status.has_ended
    assert document["errors"]["data"][0]["line"] is None
    assert describe_batch(replace(batch, errors=()))["errors"] is None


def test_windows_and_metadata() -> None:
    for text, seconds in (("24h", 86400.0), ("1d", 86400.0), ("90m", 5400.0), ("61s", 61.0), ("30d", 2592000.0)):
        assert read_window(text) == seconds
        assert read_window(format_window(seconds)) == seconds
    for value in ("24", "h", "59s", "31d", "-1h", "1.5h", "\uff19h", "9999999d", None, 24, ""):
        with pytest.raises(BadRequest):
            read_window(value)
    assert read_metadata(None) == {}
    wrong: Any
    for wrong in ([], {"a": None}, {"a" * 65: ""}, {"a": "b" * 513}, {str(number): "" for number in range(17)}):
        with pytest.raises(BadRequest):
            read_metadata(wrong)


def test_endpoints_use_a_model_and_take_json() -> None:
    for path in (CHAT_PATH, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/v1/messages"):
        assert is_batch_endpoint(path), path
    for path in (
        "/api/chat",
        "/api/delete",
        "/mesh/nodes/a/drain",
        "/v1/files",
        "/v1/batches",
        "/v1/batches/a/cancel",
        "/v1/audio/transcriptions",
        "/v1/models/load",
        "/v1/../api/delete",
        "/v1/../x/embeddings",
        "/v1/embeddings?model=x",
        "/v1//embeddings",
        "/v1/%65mbeddings",
        "v1/embeddings",
        "",
    ):
        assert not is_batch_endpoint(path), path
