"""Meshes over the same simulated servers and a real Redis: what one tells, the others act on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gpumesh.balancer.base import Priority
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.chat import chat_demand, read_request
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.nodes.prober import BACKEND_INTERVAL_S
from gpumesh.mesh.sharing.fleet_sharing import FleetSharing
from gpumesh.state import Health
from gpumesh.topology import NodeSpec, RedisSpec, Topology
from tests.coordination.redis_server import RedisServer, redis_server
from tests.mesh.meshes import MODEL, host, node
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


@asynccontextmanager
async def open_mesh(redis: RedisServer, *nodes: NodeSpec) -> AsyncIterator[Mesh]:
    async with Mesh(Topology("home", nodes, redis=RedisSpec(redis.url))) as mesh:
        await mesh.wait_first_report(10.0)
        yield mesh


def health(mesh: Mesh, name: str) -> tuple[Health, str | None]:
    state = mesh.snapshot().node(name)
    return state.health, state.reason


async def chat(mesh: Mesh, count: int = 1, *, prompt: str = "a") -> None:
    for _ in range(count):
        async with mesh.chat(MODEL, prompt * 2000) as stream:
            async for _chunk in stream:
                pass


def knows_prompt(mesh: Mesh, prompt: str) -> list[str]:
    """The nodes that are believed to have the prompt of ``chat`` in their caches."""
    demand = chat_demand(
        read_request(MODEL, prompt * 2000), mesh.prompt_hasher, node=None, priority=Priority.NORMAL, session=None
    )
    return list(mesh._scheduler.experience.estimate(demand).cached)


async def test_gateways_share_what_they_know(redis: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimOllama(host("a", tokens_per_s=500.0)))
        spec = node("a", server.url, max_parallel=None)
        first = await stack.enter_async_context(open_mesh(redis, spec))
        await chat(first, 3)
        async with open_mesh(redis, node("b", server.url, max_parallel=None)) as second:
            # The registry.
            await wait_until(lambda: len(first.snapshot().gateways) == 2, "the first knows the second")
            await wait_until(lambda: len(second.snapshot().gateways) == 2, "the second knows the first")
            own, other = second.snapshot().gateways
            assert (own.own, other.own) == (True, False)
            assert first.snapshot().gateways[0].id == other.id
            # What was learned.
            learned = first.fleet["a"]
            await wait_until(lambda: second.fleet["b"].rates.is_measured(MODEL), "the second has its rates")
            assert second.fleet["b"].rates.decode_s(MODEL, 100) == pytest.approx(learned.rates.decode_s(MODEL, 100))
            assert second.fleet["b"].learned_slots.as_dict() == learned.learned_slots.as_dict()
            # Prompts, also those of a gateway that began later.
            assert (knows_prompt(first, "c"), knows_prompt(second, "d")) == ([], [])
            await chat(second, prompt="c")
            await wait_until(lambda: knows_prompt(first, "c") == ["a"], "the prompt is known")
            await chat(first, prompt="d")
            await wait_until(lambda: knows_prompt(second, "d") == ["b"], "the prompt is known")
            # Drains.
            first.drain("a")
            await wait_until(lambda: health(second, "b")[0] is Health.DRAINING, "the drain is known")
            assert (health(second, "b")[1] or "").startswith("drained at the gateway on ")
            assert health(first, "a")[1] == "a person asked for no new work"
            first.resume("a")
            await wait_until(lambda: health(second, "b")[0] is Health.HEALTHY, "the drain has ended")
            second.drain("b")
            await wait_until(lambda: health(first, "a")[0] is Health.DRAINING, "the drain is known")
            first.resume("a")  # at this gateway only
            await chat(first)
            assert health(second, "b")[0] is Health.DRAINING
            second.resume("b")
            second.drain("b")
        await wait_until(lambda: len(first.snapshot().gateways) == 1, "the second has left")
        assert health(first, "a")[0] is Health.HEALTHY, "a drain ends with its gateway"


async def test_a_node_that_fails_at_one_gateway_is_probed_at_once_by_the_others(redis: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(SimOllama(host("a")))
        spec = node("a", server.url)
        first, second = [await stack.enter_async_context(open_mesh(redis, spec)) for _ in range(2)]
        await wait_until(lambda: len(first.snapshot().gateways) == 2, "they know each other")
        sharing, prober = first._sharing, second.fleet["a"]._prober
        assert isinstance(sharing, FleetSharing)
        [server_id] = sharing.learned_times()
        asked_at = prober.asked_at
        told_at = time.monotonic()
        sharing.exchange.tell_server_change(server_id, is_up=False)
        await wait_until(lambda: prober.asked_at > asked_at, "it was probed")
        assert prober.asked_at - told_at < BACKEND_INTERVAL_S / 4, "before the next probe was due"
        assert health(second, "a")[0] is Health.HEALTHY, "the other gateway is not believed"
