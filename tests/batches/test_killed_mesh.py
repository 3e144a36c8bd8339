"""A mesh that is killed while it works on a batch: each request still gets exactly one result."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from gpumesh.batches.sqlite.store import SqliteBatchStore
from gpumesh.batches.values import BatchStatus
from gpumesh.lab.ollama import SimOllama
from tests.batches.killed_mesh import (
    ANSWER_TOKENS,
    MeshProcess,
    check_results,
    submit_prompts,
    wait_for_results,
    write_mesh_yaml,
)
from tests.mesh.meshes import MODEL, host

REQUESTS = 250


async def test_each_request_of_a_batch_gets_one_result_although_its_mesh_is_killed(tmp_path: Path) -> None:
    profile = host("n1", slots=8, answer_tokens=ANSWER_TOKENS, tokens_per_s=200.0)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimOllama(profile))
        config = tmp_path / "mesh.yaml"
        write_mesh_yaml(config, [server.url], slots=8, listen="127.0.0.1:0", more={})
        mesh = MeshProcess(tmp_path, config, "--no-gateway")
        stack.push_async_callback(mesh.close)
        store = await stack.enter_async_context(SqliteBatchStore(mesh.batches))
        batch = await submit_prompts(store, REQUESTS, MODEL)
        for count in (40, 100, REQUESTS):
            await mesh.start()
            try:
                batch = await wait_for_results(store, batch, count, limit_s=40.0)
            except TimeoutError as error:
                raise AssertionError(f"{error}\n{mesh.log()}") from None
            await mesh.end()
        assert (batch.status, batch.counts.completed) == (BatchStatus.COMPLETED, REQUESTS)
        results = await check_results(store, batch, MODEL)
    assert (results.results, results.right, results.lines_with_several, results.failed) == (REQUESTS, REQUESTS, 0, 0)
