"""The batch calls of the unmodified `openai` client, through a gateway that really works on the batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gpumesh.lab.profile import EMBEDDER, QWEN_7B, Faults
from gpumesh.topology import GatewaySpec
from tests.gateway.batches.serving import serve_batches, work_on_batches
from tests.gateway.fleet import MODEL, RunningGateway, quick_host
from tests.gateway.test_key_limits import key

if TYPE_CHECKING:  # each test imports the client: it takes two seconds, which every test process would pay
    import openai
    from openai.types import Batch

pytestmark = pytest.mark.real

CHAT_PATH: Any = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine that the tests run on."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    host = quick_host("a", models=(QWEN_7B, EMBEDDER))
    spec = GatewaySpec(keys=(key("ann"), key("bob")))
    async with (
        serve_batches(tmp_path, host, spec=spec, max_parallel=4) as (running, store),
        work_on_batches(running, store),
    ):
        yield running


def connect(running: RunningGateway, name: str = "ann") -> openai.AsyncOpenAI:
    import openai

    return openai.AsyncOpenAI(base_url=f"{running.gateway.url}/v1", api_key=name)


@pytest.fixture
async def client(running: RunningGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(running) as client:
        yield client


def make_line(name: str, url: str = CHAT_PATH, **body: Any) -> str:
    body = {"model": MODEL, **({} if "input" in body else {"messages": [{"role": "user", "content": name}]}), **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n"


async def upload(client: openai.AsyncOpenAI, *lines: str) -> str:
    return (await client.files.create(file=("in.jsonl", "".join(lines).encode()), purpose="batch")).id


async def create(client: openai.AsyncOpenAI, *lines: str, endpoint: Any = CHAT_PATH) -> Batch:
    file_id = await upload(client, *lines)
    return await client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h")


async def wait_ended(client: openai.AsyncOpenAI, batch_id: str, statuses: tuple[str, ...] = ENDED) -> Batch:
    async with asyncio.timeout(20):
        while (batch := await client.batches.retrieve(batch_id)).status not in statuses:
            await asyncio.sleep(0.05)
    return batch


async def read_lines(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file of results by their ``custom_id``."""
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


async def test_a_batch_from_upload_to_download(client: openai.AsyncOpenAI) -> None:
    names = [f"request-{number}" for number in range(20)]
    lines = [make_line(name) for name in names]
    batch = await create(client, *lines, "no json\n", make_line("refused", messages=[]), make_line(names[0]))
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT_PATH, "24h")
    batch = await wait_ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    output = await read_lines(client, batch.output_file_id)
    assert sorted(output) == sorted(names)
    for line in output.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"]
    assert len({line["id"] for line in output.values()}) == 20
    errors = await read_lines(client, batch.error_file_id)
    assert errors["refused"]["response"]["status_code"] == 400
    assert errors["refused"]["response"]["body"]["error"]
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (21, "invalid_json_line"),
        (23, "duplicate_custom_id"),
    ]


async def test_a_file_of_the_disk_by_the_client_without_async(running: RunningGateway, tmp_path: Path) -> None:
    import openai

    path = tmp_path / "requests.jsonl"
    path.write_text(
        "".join(make_line(f"r{number}", "/v1/embeddings", model=EMBEDDER.name, input="x") for number in range(3))
    )

    def use_client() -> list[Any]:
        with openai.OpenAI(base_url=f"{running.gateway.url}/v1", api_key="ann") as client:
            with path.open("rb") as file:
                uploaded = client.files.create(file=file, purpose="batch")
            assert (uploaded.filename, uploaded.bytes) == ("requests.jsonl", path.stat().st_size)
            assert client.files.content(uploaded.id).read() == path.read_bytes()
            batch = client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/embeddings",
                completion_window="24h",
                metadata={"night": "1"},
            )
            while batch.status not in ENDED:
                batch = client.batches.retrieve(batch.id)
            assert batch.metadata == {"night": "1"}
            assert batch.output_file_id is not None
            with client.files.with_streaming_response.content(batch.output_file_id) as reply:
                return [json.loads(line) for line in reply.iter_lines()]

    results = await asyncio.to_thread(use_client)
    assert len(results) == 3
    assert all(line["response"]["body"]["data"][0]["embedding"] for line in results)


async def test_a_batch_is_cancelled_and_keeps_its_results(running: RunningGateway, client: openai.AsyncOpenAI) -> None:
    import openai

    host = running.hosts["a"]
    first = await create(client, make_line("first"))
    assert (await wait_ended(client, first.id)).status == "completed"
    with pytest.raises(openai.ConflictError, match="status completed"):
        await client.batches.cancel(first.id)
    await host.set_faults(Faults(hang=True, paths=("/v1/",)))
    batch = await create(client, *(make_line(f"r{number}") for number in range(30)))
    await wait_ended(client, batch.id, ("in_progress",))
    cancelled = await client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    batch = await wait_ended(client, batch.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert batch.request_counts is not None
    assert batch.request_counts.completed < batch.request_counts.total == 30


async def test_pages_and_deletion(client: openai.AsyncOpenAI) -> None:
    import openai

    file_ids = [await upload(client, make_line(f"r{number}")) for number in range(5)]
    assert [file.id async for file in client.files.list(limit=2)] == [file.id async for file in client.files.list()]
    assert sorted([file.id async for file in client.files.list(limit=2, order="asc")]) == sorted(file_ids)
    assert [file.id async for file in client.files.list(purpose="vision")] == []
    for file_id in file_ids[:3]:
        await client.batches.create(input_file_id=file_id, endpoint=CHAT_PATH, completion_window="24h")
    batches = [batch async for batch in client.batches.list(limit=2)]
    assert sorted(batch.input_file_id for batch in batches) == sorted(file_ids[:3])
    outputs = [(await wait_ended(client, batch.id)).output_file_id for batch in batches]
    assert [file.id async for file in client.files.list(purpose="batch_output", limit=2)] == outputs
    assert (await client.files.delete(file_ids[4])).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file_ids[4])


async def test_what_is_wrong_has_the_error_of_the_client(running: RunningGateway, client: openai.AsyncOpenAI) -> None:
    import openai

    file_id = await upload(client, "no json\n")
    failed = await client.batches.create(input_file_id=file_id, endpoint=CHAT_PATH, completion_window="24h")
    failed = await wait_ended(client, failed.id)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.files.create(file=("a.jsonl", b"{}"), purpose="vision")
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        await client.batches.create(input_file_id="file-none", endpoint=CHAT_PATH, completion_window="24h")
    wrong_endpoint: Any = "/v1/videos"
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        await client.batches.create(input_file_id=file_id, endpoint=wrong_endpoint, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        await client.batches.retrieve("batch_none")
    async with connect(running, "bob") as bob:
        with pytest.raises(openai.NotFoundError):
            await bob.files.content(file_id)
        with pytest.raises(openai.NotFoundError):
            await bob.batches.retrieve(failed.id)
    async with connect(running, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.files.list()
