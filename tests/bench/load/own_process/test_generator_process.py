"""The load generator's own process: a real one, that is really cancelled and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from gpumesh.backends.base import ChatRequest, Message
from gpumesh.bench.load.conditions import Via
from gpumesh.bench.load.http.client_apis import ClientApi
from gpumesh.bench.load.http.raw_sender import Endpoint
from gpumesh.bench.load.own_process import generator_messages as messages
from gpumesh.bench.load.own_process import generator_process
from gpumesh.bench.load.own_process.generator_link import GeneratorProcess
from gpumesh.bench.load.own_process.generator_process import StageInProcess
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from gpumesh.errors import GPUMeshError
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import Faults
from gpumesh.mesh.requests.connections.connection_pool import ConnectionPool
from tests.mesh.meshes import MODEL, host

CHAT = ChatRequest(MODEL, (Message("user", "Hello ☃"),), MappingProxyType({"num_predict": 4}), think=False)
STAGE = Stage("mesh", StageKind.MESH, (PlannedRequest(CHAT),) * 6, concurrency=2)


@asynccontextmanager
async def server_and_generator() -> AsyncIterator[tuple[SimOllama, Endpoint, GeneratorProcess]]:
    async with SimOllama(host("alpha")) as server, GeneratorProcess() as generator, asyncio.timeout(50):
        yield server, Endpoint(server.url, ClientApi.OLLAMA, api_key="planted-key"), generator


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


async def wait_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.01)


async def test_stages_in_a_process_of_their_own() -> None:
    seen: list[LoadSample] = []
    async with server_and_generator() as (server, endpoint, generator):
        run = await generator.run_stage(STAGE, [endpoint], Via.URL, on_record=seen.append, mesh_pid=os.getpid())
        assert [record.index for record in run.records] == list(range(6))
        assert {record.outcome for record in run.records} == {SampleOutcome.SERVED}
        assert all((len(record.arrivals_s), record.tokens) == (4, 4) for record in run.records)
        assert all(0 <= record.sent_s < record.arrivals_s[0] < record.ended_s for record in run.records)
        assert run.duration_s >= max(record.ended_s for record in run.records)
        assert sorted(record.index for record in seen) == list(range(6))
        assert run.conditions is not None
        assert (run.conditions.via, run.conditions.own_process) == (Via.URL, True)
        assert run.conditions.us_per_piece is not None
        if sys.platform == "linux":
            assert run.conditions.machine is not None
            assert run.conditions.mesh is not None

        # The next stage: an open loop, whose time is up before its last request.
        requests = tuple(PlannedRequest(CHAT, at_s=at_s) for at_s in (0.1, 0.0, 9.0))
        opened = replace(STAGE, requests=requests, concurrency=None, duration_s=1.0)
        run = await generator.run_stage(opened, [endpoint], Via.URL)
        assert [record.index for record in run.records] == [0, 1]
        assert [record.intended_s for record in run.records] == pytest.approx([0.1, 0.0])
        assert run.records[0].sent_s >= 0.1
        assert run.client.late_sends <= 2

        # What a server does wrong is a record.
        await server.set_faults(Faults(status=500, times=1))
        run = await generator.run_stage(STAGE, [endpoint], Via.URL)
        assert sorted(record.outcome for record in run.records) == [SampleOutcome.FAILED, *[SampleOutcome.SERVED] * 5]

        if sys.platform == "linux":  # secrets are in no arguments and variables
            folder = Path(f"/proc/{generator.pid}")
            assert b"planted-key" not in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        pid = generator.pid
    assert pid is not None
    assert not is_running(pid)


async def test_cancelling_a_stage_ends_the_process_and_its_requests() -> None:
    async with server_and_generator() as (server, endpoint, generator):
        await server.set_faults(Faults(stall_after_tokens=1))
        running = asyncio.create_task(generator.run_stage(STAGE, [endpoint], Via.URL))
        while server.counters.running < 2:
            await asyncio.sleep(0.005)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert generator.pid is not None
        await wait_gone(generator.pid)
        while server.counters.running:
            await asyncio.sleep(0.005)


async def test_a_generator_that_dies_is_an_error() -> None:
    async with server_and_generator() as (server, endpoint, generator):
        await server.set_faults(Faults(stall_after_tokens=1))
        running = asyncio.create_task(generator.run_stage(STAGE, [endpoint], Via.URL))
        while server.counters.running < 2:
            await asyncio.sleep(0.005)
        assert generator.pid is not None
        os.kill(generator.pid, signal.SIGKILL)
        with pytest.raises(GPUMeshError, match="ended unexpectedly"):
            await running


async def test_it_dies_with_its_parent() -> None:
    """The parent is killed, so it cannot clean up."""
    program = (
        "import asyncio\n"
        "from gpumesh.bench.load.own_process.generator_link import GeneratorProcess\n"
        "async def main():\n"
        "    async with GeneratorProcess() as generator:\n"
        "        print(generator.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await wait_gone(pid)


class Collector:
    """In the place of the pipe to the benchmark."""

    def __init__(self) -> None:
        self.received: list[messages.FromGenerator] = []

    def write(self, line: bytes) -> None:
        self.received.append(messages.decode_from_generator(line))

    async def drain(self) -> None:
        pass


async def test_with_too_much_to_hold_answers_are_parsed_as_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_process, "MAX_HELD_BYTES", 1500)  # of about 700 bytes for each answer
    async with SimOllama(host("alpha")) as server:
        pool = ConnectionPool(asyncio.get_running_loop())
        collector = Collector()
        endpoints = (Endpoint(server.url, ClientApi.OLLAMA),)
        opened = messages.OpenStage("mesh", 2, None, 0.0, endpoints, Via.URL, 20.0, None)
        stage = StageInProcess(opened, pool, collector)  # type: ignore[arg-type]
        for _ in range(6):
            stage.add(messages.AddRequest(CHAT, None, None))
        await stage.run()
        pool.close()
    samples = [sample for some in collector.received if isinstance(some, messages.Samples) for sample in some.samples]
    assert [(sample.index, sample.tokens) for sample in samples] == [(index, 4) for index in range(6)]
    ended = collector.received[-1]
    assert isinstance(ended, messages.StageEnded)
    assert 0 < ended.conditions.parsed_early < 6
