"""``/v1/files`` over HTTP: uploads of any form, pages, what each key sees, and uploads that are refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from gpumesh.batches.base import BatchStore
from gpumesh.gateway.batches import file_routes, upload
from gpumesh.lab.profile import QWEN_7B
from gpumesh.topology import GatewaySpec
from tests.gateway.batches.serving import serve_batches
from tests.gateway.fleet import RunningGateway, quick_host, send_raw
from tests.gateway.test_key_limits import bearer, key
from tests.tunnels.polling import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = (key("ann"), key("bob", models=("no-model",)))
Served = tuple[RunningGateway, BatchStore]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("batches")
    async with serve_batches(folder, quick_host("a", models=(QWEN_7B,)), spec=GatewaySpec(keys=KEYS)) as made:
        yield made


async def put(served: Served, content: Any, *, owner: str = "ann", name: str = "in.jsonl", **fields: str) -> Any:
    fields = {"purpose": "batch", **fields}
    return await served[0].client.post("/v1/files", files={"file": (name, content)}, data=fields, headers=bearer(owner))


async def get(served: Served, path: str, owner: str = "ann") -> Any:
    return await served[0].client.get(path, headers=bearer(owner))


async def list_ids(served: Served, query: str = "", owner: str = "ann") -> list[str]:
    return [file["id"] for file in (await get(served, f"/v1/files{query}", owner)).json()["data"]]


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    lines = (b"--b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), body) for head, body in parts)
    return b"".join(lines) + end


FILE = ('name="file"; filename="C:\\folder\\ä\x1b[1m.jsonl"', b"{}\n")
PURPOSE = ('name="purpose"', b"batch")


async def test_a_file_comes_back_as_it_was_sent(served: Served) -> None:
    content = bytes(range(256)) * 9000  # 2.2 MiB, with every byte
    reply = await put(served, content, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert reply.status_code == 200
    file = reply.json()
    assert (file["object"], file["bytes"], file["filename"]) == ("file", len(content), "in.jsonl")
    assert (file["purpose"], file["status"]) == ("batch", "processed")
    assert (await get(served, f"/v1/files/{file['id']}")).json() == file
    got = await get(served, f"/v1/files/{file['id']}/content")
    assert hashlib.sha256(got.content).digest() == hashlib.sha256(content).digest()
    assert got.headers["Content-Type"] == "application/octet-stream"
    head = await served[0].client.head(f"/v1/files/{file['id']}/content", headers=bearer("ann"))
    assert (head.status_code, head.content) == (200, b"")
    deleted = await served[0].client.delete(f"/v1/files/{file['id']}", headers=bearer("ann"))
    assert deleted.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert (await get(served, f"/v1/files/{file['id']}")).status_code == 404


async def test_an_empty_file_and_one_in_chunks_are_files(served: Served) -> None:
    assert (await put(served, b"")).json()["bytes"] == 0
    body = form(FILE, PURPOSE)

    async def pieces() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes([byte])

    headers = {**bearer("ann"), "Content-Type": "multipart/form-data; boundary=b"}
    reply = await served[0].client.post("/v1/files", content=pieces(), headers=headers)
    assert reply.status_code == 200
    assert (reply.json()["filename"], reply.json()["bytes"]) == ("ä.jsonl", 3)


async def test_a_key_sees_its_own_files_only(served: Served) -> None:
    file_id = (await put(served, b"{}")).json()["id"]
    bobs_id = (await put(served, b"{}", owner="bob")).json()["id"]
    assert file_id in await list_ids(served)
    assert await list_ids(served, owner="bob") == [bobs_id], "a limited key has files of its own"
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", "/v1/files/file-none"):
        error = (await get(served, path, "bob")).json()["error"]
        assert (error["type"], error["param"]) == ("not_found_error", None)
    assert (await served[0].client.delete(f"/v1/files/{file_id}", headers=bearer("bob"))).status_code == 404
    assert (await served[0].client.get("/v1/files")).status_code == 401
    assert (await get(served, f"/v1/files/{file_id}")).status_code == 200


async def test_files_are_listed_page_by_page(served: Served) -> None:
    for file_id in await list_ids(served, owner="bob"):
        await served[0].client.delete(f"/v1/files/{file_id}", headers=bearer("bob"))
    for number in range(5):
        await put(served, b"{}", owner="bob", name=f"{number}.jsonl")
    ids = await list_ids(served, owner="bob")
    assert len(ids) == 5
    page = (await get(served, "/v1/files?limit=2", "bob")).json()
    assert [page["first_id"], page["last_id"], page["has_more"]] == [ids[0], ids[1], True]
    assert await list_ids(served, f"?limit=2&after={ids[1]}", "bob") == ids[2:4]
    last = (await get(served, f"/v1/files?limit=2&after={ids[3]}&purpose=batch", "bob")).json()
    assert ([file["id"] for file in last["data"]], last["has_more"]) == ([ids[4]], False)
    assert await list_ids(served, f"?order=asc&limit=3&after={ids[4]}", "bob") == [ids[3], ids[2], ids[1]]
    for query in ("?purpose=vision", "?purpose=batch_output", "?after=file-none", "?after=file-output-none"):
        assert await list_ids(served, query, "bob") == []
    for query in (
        "?limit=0",
        "?limit=10001",
        "?limit=x",
        "?order=up",
        "?after=%FF",
        "?" + "&".join("a=b" for _ in range(30)),
    ):
        assert (await get(served, f"/v1/files{query}")).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (form(FILE), 400, "purpose is required"),
        (form(('name="purpose"', b"vision"), FILE), 400, "purpose is `batch`"),
        (form(FILE, ('name="purpose"', b"vision")), 400, "purpose is `batch`"),
        (form(PURPOSE), 400, "no part `file`"),
        (form(PURPOSE, FILE, end=b""), 400, "ends too early"),
        (form(PURPOSE, FILE, FILE), 400, "twice"),
        (form(PURPOSE, FILE) + b"more", 400, "follows after"),
        (b"{}", 400, "does not begin"),
        (b"", 400, "ends too early"),
        (form(PURPOSE, ('name="file"; filename="a"', b"x" * 5000)), 413, "too large"),
    ],
)
async def test_what_is_no_upload_leaves_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, reason: str
) -> None:
    monkeypatch.setattr(upload, "MAX_FILE_BYTES", 4000)
    before = await list_ids(served)
    headers = {**bearer("ann"), "Content-Type": "multipart/form-data; boundary=b"}
    reply = await served[0].client.post("/v1/files", content=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert reason in reply.json()["error"]["message"]
    assert await list_ids(served) == before


async def test_what_is_no_form_and_what_is_too_long_is_refused_before_it_is_read(served: Served) -> None:
    for content_type, status in (("application/json", 415), ("multipart/form-data", 400)):
        headers = {**bearer("ann"), "Content-Type": content_type}
        assert (await served[0].client.post("/v1/files", content=b"{}", headers=headers)).status_code == status
    packed = {**bearer("ann"), "Content-Type": "multipart/form-data; boundary=b", "Content-Encoding": "gzip"}
    assert (await served[0].client.post("/v1/files", content=b"x", headers=packed)).status_code == 415
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\nConnection: close\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999999999\r\n\r\n"
    )
    assert b" 413 " in (await send_raw(served[0].port, head.encode())).split(b"\r\n")[0]


async def test_an_upload_that_breaks_off_leaves_nothing(served: Served) -> None:
    running, store = served
    before = len(await store.list_files())
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9000000\r\n\r\n"
    )
    writer.write(head.encode() + form(PURPOSE, FILE, end=b"")[:-2] + b"x" * 4_000_000)
    await writer.drain()
    await wait_until(lambda: bool(running.gateway._active), "the upload has begun")
    writer.close()
    await wait_until(lambda: not running.gateway._active, "the upload has ended")
    assert len(await store.list_files()) == before
    del reader


async def test_one_key_cannot_fill_the_store(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for file_id in await list_ids(served):
        await served[0].client.delete(f"/v1/files/{file_id}", headers=bearer("ann"))
    monkeypatch.setattr(file_routes, "MAX_OWNER_BYTES", 10_000)
    replies = await asyncio.gather(*(put(served, b"x" * 4000) for _ in range(5)))
    stored = [reply for reply in replies if reply.status_code == 200]
    assert len(stored) == 2, "also those count that arrive at the same time"
    refused = await put(served, b"x" * 4000)
    assert (refused.status_code, refused.headers["X-Should-Retry"]) == (429, "false")
    assert "delete those that are not needed" in refused.json()["error"]["message"]
    await served[0].client.delete(f"/v1/files/{stored[0].json()['id']}", headers=bearer("ann"))
    assert (await put(served, b"x" * 4000)).status_code == 200


async def test_other_methods_and_paths_are_refused(served: Served) -> None:
    request = served[0].client.request
    for method, path, status in (
        ("PUT", "/v1/files", 405),
        ("POST", "/v1/files/file-1", 405),
        ("DELETE", "/v1/files/file-1/content", 405),
        ("GET", "/v1/files/", 404),
        ("GET", "/v1/files/%FF", 404),
        ("GET", "/v1/files/file-1%00", 404),
        ("GET", "/v1/files/a/b/content", 404),
        ("GET", "/v1/files/a/other", 404),
    ):
        assert (await request(method, path, headers=bearer("ann"))).status_code == status, path
    preflight = await request(
        "OPTIONS", "/v1/files", headers={"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 204


async def test_a_store_that_fails_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpumesh.errors import BatchStoreError

    async def fail(*_: Any, **__: Any) -> None:
        raise BatchStoreError("the disk is full")

    monkeypatch.setattr(type(served[1]), "get_file", fail)
    reply = await get(served, "/v1/files/file-1")
    assert (reply.status_code, reply.headers["X-GPUMesh-Error"]) == (503, "batch-store")
    assert "the disk is full" in json.dumps(reply.json())
