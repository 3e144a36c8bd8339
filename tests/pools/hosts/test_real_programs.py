"""llama.cpp's real programs on this machine, from the look for them to a loaded model that equals its plan."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.errors import PoolFailed
from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import PathKind, PoolPlan, WorkerPath
from gpumesh.pools.hosts.commands import WorkerAddress, llama_server_argv, nodes_by_endpoint, rpc_server_argv
from gpumesh.pools.hosts.comparison import compare_with_plan
from gpumesh.pools.hosts.guarded_program import GuardedProgram, run_guarded
from gpumesh.pools.hosts.head_log import HeadLog
from gpumesh.pools.hosts.model_files import read_model
from gpumesh.pools.hosts.offers import host_offer
from gpumesh.pools.hosts.ports import choose_free_ports
from gpumesh.pools.hosts.programs import HostPrograms, find_programs
from gpumesh.pools.hosts.rpc_hello import ask_rpc_version
from gpumesh.pools.planning.plan import plan_pool
from gpumesh.probes.nvidia_smi import GpuReport
from tests.http_clients import loopback_client
from tests.pools.hosts.local_route import LocalRoute, local_route
from tests.prerequisites import llama_server, needs
from tests.real.tiny_model import write_tiny_model
from tests.tunnels.sshd import listener

pytestmark = [pytest.mark.real, needs("llama-server")]
MEMBERS = (PoolMember("iceland", 200), PoolMember("cellar", 200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", layers=8)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[LocalRoute]:
    """A host whose programs compute in one thread: idle threads of llama.cpp spin, and tests run side by side."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    async with local_route(environment=environment) as route:
        yield route


async def look(host: LocalRoute, model: Path) -> tuple[PoolPlan, HostPrograms, tuple[int, ...]]:
    """The plan of a pool of two hosts, which are this one; its programs; and some free ports."""
    server = llama_server()
    assert server is not None
    programs = await find_programs(host, "iceland", llama_cpp_dir=str(server.parent))
    shape = (await read_model(host, str(model), node="iceland")).shape
    spec = PoolSpec("tiny", str(model), MEMBERS, "iceland", context=512, parallel=2, split=(4, 4))
    offers = [host_offer(GpuReport(), member, replace(programs, node=member.node)) for member in MEMBERS]
    plan = plan_pool(spec, shape, offers, {"cellar": WorkerPath(PathKind.LOCAL, 0.0, 1e9)})
    assert plan.fits, plan.problems
    return plan, programs, choose_free_ports(programs.used_ports, 3, random.Random())


@asynccontextmanager
async def running_worker(
    host: LocalRoute, plan: PoolPlan, programs: HostPrograms, port: int
) -> AsyncIterator[GuardedProgram]:
    (member,) = plan.workers
    async with run_guarded(host, rpc_server_argv(member, programs, port)) as worker:
        while await ask_rpc_version("127.0.0.1", port) is None:
            assert worker.end is None, worker.end
        yield worker


async def follow(head: GuardedProgram, log: HeadLog) -> None:
    """Reads the log until the model is loaded, or it names a failure, or llama-server has ended."""
    async for line in head.lines():
        log.feed(line)
        if log.is_ready or log.error is not None:
            return


async def read_failure(host: LocalRoute, argv: Sequence[str], nodes: Mapping[str, str]) -> HeadLog:
    """The log of a llama-server that fails at its start. In one of twenty ends, llama-server loses the last lines of
    its log: then it is started again."""
    for _ in range(5):
        log = HeadLog(nodes)
        async with run_guarded(host, argv) as head:
            await follow(head, log)
            end = await head.wait_ended()
        assert end.exit_status == 1
        if log.error is not None:
            break
    return log


async def test_a_pool_is_loaded_as_planned(host: LocalRoute, model: Path) -> None:
    plan, programs, (worker_port, port, _) = await look(host, model)
    assert programs.rpc is not None
    assert programs.build is not None
    workers = (WorkerAddress("cellar", worker_port),)
    async with running_worker(host, plan, programs, worker_port) as worker:
        assert await ask_rpc_version("127.0.0.1", worker_port) == programs.rpc
        argv = llama_server_argv(plan, programs, model_path=str(model), workers=workers, port=port, alias="tiny")
        log = HeadLog(nodes_by_endpoint(workers))
        async with run_guarded(host, argv) as head:
            await follow(head, log)
            assert log.is_ready, (log.error, head.end)
            assert log.devices == {"RPC0": f"127.0.0.1:{worker_port}"}
            assert compare_with_plan(plan, log, programs=programs, workers=workers) == ()
            async with loopback_client() as http:
                slots = (await http.get(f"http://127.0.0.1:{port}/slots")).json()
            assert [slot["n_ctx"] for slot in slots] == [plan.context, plan.context], "no stream takes the other's part"
        assert head.end is not None
        assert head.end.exit_status == 0, head.end
    assert str(worker.end) == "was ended by SIGTERM"


async def test_a_worker_that_is_missing_is_named(host: LocalRoute, model: Path) -> None:
    plan, programs, (worker_port, port, _) = await look(host, model)
    workers = (WorkerAddress("cellar", worker_port),)
    argv = llama_server_argv(plan, programs, model_path=str(model), workers=workers, port=port, alias="tiny")
    log = await read_failure(host, argv, nodes_by_endpoint(workers))
    assert log.error is not None
    assert log.error.message == "the head cannot connect to the worker on cellar"
    assert compare_with_plan(plan, log, programs=programs, workers=workers)


async def test_a_worker_that_dies_is_named_by_the_head_and_by_its_own_end(host: LocalRoute, model: Path) -> None:
    plan, programs, (worker_port, port, _) = await look(host, model)
    workers = (WorkerAddress("cellar", worker_port),)
    argv = llama_server_argv(plan, programs, model_path=str(model), workers=workers, port=port, alias="tiny")
    log = HeadLog(nodes_by_endpoint(workers))
    async with running_worker(host, plan, programs, worker_port) as worker, run_guarded(host, argv) as head:
        await follow(head, log)
        await worker.stop()
        assert str(worker.end) == "was ended by SIGTERM"
        assert head.end is None, "llama-server does not notice before it needs the worker"


async def test_failures_of_llama_server(host: LocalRoute, model: Path, tmp_path: Path) -> None:
    plan, programs, (_, port, _) = await look(host, model)
    alone = replace(plan, members=tuple(replace(member, shares=()) for member in plan.members))
    with listener() as taken:
        cases = {
            "there is no model": (tmp_path / "nowhere.gguf", port, "failed to open GGUF file"),
            "the port is taken": (model, taken.getsockname()[1], "was taken meanwhile"),
        }
        for case, (path, server_port, text) in cases.items():
            argv = llama_server_argv(alone, programs, model_path=str(path), workers=(), port=server_port, alias="tiny")
            log = await read_failure(host, argv, {})
            assert log.error is not None, case
            assert text in log.error.message


async def test_another_server_on_a_workers_port() -> None:
    with listener() as silent:
        assert await ask_rpc_version("127.0.0.1", silent.getsockname()[1], timeout_s=0.05) is None

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        with pytest.raises(PoolFailed, match="does not answer as ggml-rpc-server does"):
            await ask_rpc_version("127.0.0.1", server.sockets[0].getsockname()[1])
