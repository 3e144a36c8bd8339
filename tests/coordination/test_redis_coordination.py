"""Over a real Redis: two that share loads, and what happens when it goes away and comes back."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpumesh.coordination.redis_coordination import RedisCoordination
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.chat import ChatStream
from gpumesh.mesh.mesh import Mesh
from gpumesh.topology import BackendSpec, NodeSpec, RedisSpec, Target, Topology
from tests.prerequisites import needs, program
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]


@dataclass
class Redis:
    """A redis-server on a Unix socket, without files."""

    folder: Path
    password: str | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 'redis.sock'}"

    async def start(self) -> None:
        binary = program("redis-server")
        assert binary is not None
        socket = self.folder / "redis.sock"
        command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        if self.password is not None:
            command += ["--requirepass", self.password]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.folder)
        await wait_until(socket.exists, "redis listens")

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait()
        (self.folder / "redis.sock").unlink(missing_ok=True)


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    server = Redis(tmp_path)
    await server.start()
    yield server
    server.stop()


@dataclass
class Gateway:
    shared: RedisCoordination
    changes: list[str | None] = field(default_factory=list)


@asynccontextmanager
async def gateway(url: str, password: Callable[[], str | None] = lambda: None) -> AsyncIterator[Gateway]:
    running: Gateway
    running = Gateway(
        RedisCoordination(url, password=password, on_change=lambda: running.changes.append(running.shared.problem))
    )
    task = asyncio.create_task(running.shared.run())
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_two_gateways_know_each_others_loads_until_one_leaves(redis: Redis) -> None:
    async with gateway(redis.url) as first:
        async with gateway(redis.url) as second:
            await wait_until(lambda: len(first.changes) > 0 and len(second.changes) > 0, "both are connected")
            first.shared.publish_loads({"GPU-1": 3, "GPU-2": 0})
            await wait_until(lambda: second.shared.other_gateways_load("GPU-1") == 3, "the load is known")
            assert first.shared.other_gateways_load("GPU-1") == 0, "a gateway's own load is not counted"
            first.shared.publish_loads({})
            await wait_until(lambda: second.shared.other_gateways_load("GPU-1") == 0, "the load is known")
            second.shared.publish_loads({"GPU-1": 1})
            await wait_until(lambda: first.shared.other_gateways_load("GPU-1") == 1, "the load is known")
        await wait_until(lambda: first.shared.other_gateways_load("GPU-1") == 0, "it left")


async def test_a_new_gateway_learns_the_loads_from_heartbeats(redis: Redis) -> None:
    async with gateway(redis.url) as first:
        first.shared.publish_loads({"GPU-1": 2})
        async with gateway(redis.url) as late:
            await wait_until(lambda: late.shared.other_gateways_load("GPU-1") == 2, "the heartbeat has it")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_redis_goes_and_comes_back(redis: Redis, how: signal.Signals) -> None:
    async with gateway(redis.url) as first, gateway(redis.url) as second:
        first.shared.publish_loads({"GPU-1": 2})
        await wait_until(lambda: second.shared.other_gateways_load("GPU-1") == 2, "the load is known")
        assert redis.process is not None
        if how is signal.SIGSTOP:
            os.kill(redis.process.pid, how)
        else:
            redis.stop()
        await wait_until(lambda: bool(first.shared.problem and second.shared.problem), "both have a problem")
        assert second.shared.other_gateways_load("GPU-1") == 0
        if how is signal.SIGSTOP:
            os.kill(redis.process.pid, signal.SIGCONT)
        else:
            await redis.start()
        await wait_until(lambda: second.shared.other_gateways_load("GPU-1") == 2, "the load is known again")
        assert first.shared.problem is second.shared.problem is None


async def test_a_password_that_is_wrong_or_missing_is_a_problem_that_does_not_name_it(tmp_path: Path) -> None:
    server = Redis(tmp_path, password="open-sesame")
    await server.start()
    try:
        async with gateway(server.url, lambda: "wrong-word") as first:
            await wait_until(lambda: first.shared.problem is not None, "it is refused")
            assert "wrong-word" not in (first.shared.problem or "")
        async with gateway(server.url, lambda: "open-sesame") as second:
            await wait_until(lambda: bool(second.changes) and second.shared.problem is None, "it is let in")
    finally:
        server.stop()


async def test_two_meshes_over_one_gpu_share_its_slots(redis: Redis) -> None:
    """With one slot on the node, the second mesh's request waits for the first one's."""
    slow = profile.make_host("one", tokens_per_s=50.0, load_s=0.0, answer_tokens=(60, 60))
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimOllama(slow))
        spec = NodeSpec("one", BackendSpec(targets=(Target("127.0.0.1", server.port),), max_parallel=1))
        topology = Topology("shared", (spec,), redis=RedisSpec(redis.url))
        meshes = [await stack.enter_async_context(Mesh(topology)) for _ in range(2)]
        for mesh in meshes:
            await mesh.wait_first_report(20.0)
        first = meshes[0].chat("qwen2.5:7b", "hello")
        await anext(first)
        second = asyncio.create_task(read(meshes[1].chat("qwen2.5:7b", "hello again")))
        await wait_until(lambda: meshes[1].snapshot().gateway.queued == 1, "it waits")
        await read(first)
        assert await second
        assert server.counters.max_in_flight == 1


async def read(stream: ChatStream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def test_without_redis_a_mesh_serves_and_has_a_finding(tmp_path: Path) -> None:
    async with SimOllama(profile.make_instant_host("one")) as server:
        spec = NodeSpec("one", BackendSpec(targets=(Target("127.0.0.1", server.port),)))
        topology = Topology("alone", (spec,), redis=RedisSpec(f"unix://{tmp_path / 'nobody.sock'}"))
        async with Mesh(topology) as mesh:
            await mesh.wait_first_report(20.0)
            assert await read(mesh.chat("qwen2.5:7b", "hello"))
            await wait_until(
                lambda: "redis-away" in [finding.code for finding in mesh.snapshot().findings], "the finding is there"
            )
