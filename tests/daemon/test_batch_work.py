"""A running mesh works on the batches of its mesh.yaml, with and without an address of its gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.values import PROMPT_ENDPOINT, Batch, BatchStatus, NewBatch
from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.lab.ollama import SimOllama
from gpumesh.topology import GatewaySpec, Topology
from tests.daemon.test_mesh_process import TOPOLOGY, paths_in
from tests.mesh.meshes import MODEL, host, node

CHAT = "/v1/chat/completions"


def chat_line(number: int) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"hi {number}"}]}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}) + "\n"


async def submit(store: SqliteBatchStore, endpoint: str, text: str) -> Batch:
    async def chunks() -> AsyncIterator[bytes]:
        yield text.encode()

    file = await store.create_file("in.jsonl", chunks())
    return await store.create_batch(NewBatch(endpoint, file.id))


async def wait_for_end(store: SqliteBatchStore, batch: Batch) -> Batch:
    async with asyncio.timeout(30.0):
        while not batch.status.has_ended:
            await asyncio.sleep(0.01)
            batch = await store.get_batch(batch.id)
    return batch


@pytest.mark.parametrize("gateway", [True, False])
async def test_a_mesh_works_on_the_batches_that_a_command_has_submitted(tmp_path: Path, gateway: bool) -> None:
    paths = paths_in(tmp_path)
    async with SimOllama(host("n1")) as server, SqliteBatchStore(paths.batches) as store:
        prompts = await submit(store, PROMPT_ENDPOINT, "".join(f'"prompt {number}"\n' for number in range(20)))
        topology = Topology("home", (node("n1", server.url),), replace(GatewaySpec(), port=0))
        async with run_mesh(topology, paths, gateway=gateway, shutdown=Shutdown()):
            chats = await submit(store, CHAT, "".join(map(chat_line, range(20))))
            for batch in (prompts, chats):
                ended = await wait_for_end(store, batch)
                assert (ended.status, ended.counts.completed) == (BatchStatus.COMPLETED, 20)
        first = json.loads((await store.read_results_by_line(prompts.id))[0].content)
        assert (first["prompt"], first["node"], first["error"]) == ("prompt 0", "n1", None)
        assert first["response"]
        last = json.loads((await store.read_results_by_line(chats.id))[-1].content)
        assert last["custom_id"] == "c19"
        assert last["response"]["body"]["choices"][0]["message"]["content"]


async def test_a_mesh_whose_store_cannot_be_opened_says_so_and_works(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.batches.parent.mkdir()
    paths.batches.write_bytes(b"no database" * 1000)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()) as session:
        (finding,) = [finding for finding in (await session.status()).findings if finding.code == "batch-store"]
        assert str(paths.batches) in finding.message
        assert (finding.hint or "").endswith("then `gpumesh down && gpumesh up -d`")  # it is not tried again
