"""The load generator's own process on a simulated server: a stage that is stopped, and a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.http.client_apis import ClientApi
from gpumesh.bench.load.http.raw_sender import Endpoint
from gpumesh.bench.load.own_process.generator_link import GeneratorProcess
from gpumesh.bench.load.samples import LoadSample, SampleOutcome, StageRun
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from gpumesh.lab.ollama import SimOllama
from tests.mesh.meshes import MODEL, host


@pytest.fixture
async def server() -> AsyncIterator[SimOllama]:
    async with SimOllama(host("alpha", tokens_per_s=100.0, slots=8)) as started:
        yield started


def stage(count: int, *, tokens: int, concurrency: int, conversation: int | None = None) -> Stage:
    chat = ChatRequest(MODEL, (Message("user", "hello"),), {"num_predict": tokens})
    requests = tuple(PlannedRequest(chat, conversation=conversation) for _ in range(count))
    return Stage("load", StageKind.MESH, requests, concurrency=concurrency)


async def test_what_was_measured_until_a_stop_is_kept(server: SimOllama) -> None:
    """One answer is short and the others are long: it ends, and then the stage is stopped in their midst."""
    long = stage(3, tokens=100_000, concurrency=3)
    short = stage(1, tokens=5, concurrency=3)
    plan = replace(long, requests=(*short.requests, *long.requests))
    ended: list[LoadSample] = []
    cut: list[StageRun] = []
    async with asyncio.timeout(30), GeneratorProcess() as generator:
        running = asyncio.create_task(
            generator.run_stage(
                plan,
                [Endpoint(server.url, ClientApi.OLLAMA)],
                Via.DIRECT,
                on_record=ended.append,
                on_cut_short=cut.append,
            )
        )
        while not ended or server.counters.started < 4:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    (run,) = cut
    outcomes = [record.outcome for record in run.records]
    assert outcomes == [SampleOutcome.SERVED, *[SampleOutcome.UNFINISHED] * 3]
    assert run.records[0].tokens == 5
    assert any(record.arrivals_s for record in run.records[1:]), "their pieces until then are kept"


async def test_turns_repeat_what_was_said(server: SimOllama) -> None:
    async with asyncio.timeout(30), GeneratorProcess() as generator:
        run = await generator.run_stage(
            stage(3, tokens=4, concurrency=1, conversation=7), [Endpoint(server.url, ClientApi.OLLAMA)], Via.DIRECT
        )
    counted = [record.prompt_tokens or 0 for record in run.records]
    assert [record.outcome for record in run.records] == [SampleOutcome.SERVED] * 3
    assert counted[0] < counted[1] < counted[2]
