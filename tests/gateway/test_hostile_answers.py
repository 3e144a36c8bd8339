"""Whatever one host sends, other hosts and the streams of their clients are not delayed."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from gpumesh.lab.ollama import SimOllama
from gpumesh.state import Health
from tests.gateway.fleet import MODEL, RunningGateway, node, quick_host, serve_nodes
from tests.hostile_peers import (
    COMPLETE_ANSWERS,
    SMALL_PIECE_ANSWERS,
    STALL_S,
    UNFINISHED_ANSWERS,
    HostileServer,
    ollama_with_attack,
    repeat_bytes,
    track_longest_loop_turn,
)
from tests.tunnels.polling import wait_until

MEMORY_MIB = 64
ATTACK_BYTES = 6 << 20

Run = Callable[[Coroutine[Any, Any, None]], None]
both = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@asynccontextmanager
async def beside_an_honest_node(hostile: HostileServer, *, at_once: int = 4) -> AsyncIterator[RunningGateway]:
    async with SimOllama(quick_host("honest", tokens_per_s=100.0)) as honest:
        nodes = (node("honest", honest.url, max_parallel=4), node("hostile", hostile.url, max_parallel=at_once))
        async with serve_nodes(nodes, {"honest": honest}) as fleet:
            yield fleet


def most_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def stream(fleet: RunningGateway, node_name: str, tokens: int, path: str = "/api/chat") -> tuple[int, bytes]:
    """Status and the last bytes of an answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    body |= {"options": {"num_predict": tokens}, "max_tokens": tokens}
    async with fleet.client.stream("POST", path, json=body, headers={"X-GPUMesh-Node": node_name}) as answer:
        last = b""
        async for piece in answer.aiter_raw():
            last = (last + piece)[-500:]
        return answer.status_code, last


async def test_a_turn_that_takes_too_long_is_seen() -> None:
    def compute() -> None:
        ends_at = time.thread_time() + STALL_S
        while time.thread_time() < ends_at:
            pass

    async with track_longest_loop_turn() as turn:
        await asyncio.sleep(0.02)
        assert turn() < STALL_S
        asyncio.get_running_loop().call_soon(compute)
        await asyncio.sleep(0.02)
        assert turn() >= STALL_S


@pytest.mark.parametrize("part", UNFINISHED_ANSWERS)
async def test_a_part_that_never_ends_does_not_delay_other_streams(part: str) -> None:
    start, unit = UNFINISHED_ANSWERS[part]
    with HostileServer(ollama_with_attack(MODEL, lambda: repeat_bytes(start, unit))) as hostile:
        async with beside_an_honest_node(hostile) as fleet:
            before = most_memory_mib()
            honest = asyncio.create_task(stream(fleet, "honest", 60))
            async with track_longest_loop_turn() as turn:
                status, last = await stream(fleet, "hostile", 1)
                assert status in (502, 503) or b"error" in last
                for _ in range(3):  # whichever node they go to first, the honest one answers
                    assert (await fleet.chat()).status_code == 200
                assert b'"done":true' in (await honest)[1]
                assert turn() < STALL_S
            assert "/api/chat" in hostile.paths
            assert hostile.sent < 32 << 20, "buffers of some sockets, not the whole answer"
            assert most_memory_mib() - before < MEMORY_MIB
            health = {one.name: one.health for one in fleet.mesh.snapshot().nodes}
            assert health["honest"] is Health.HEALTHY


@both
@pytest.mark.parametrize("part", SMALL_PIECE_ANSWERS)
def test_many_small_parts_do_not_delay_other_streams(part: str, run: Run) -> None:
    start, unit = SMALL_PIECE_ANSWERS[part]
    path = "/v1/chat/completions" if b"event-stream" in start else "/api/chat"

    async def check() -> None:
        with HostileServer(ollama_with_attack(MODEL, lambda: repeat_bytes(start, unit, most=ATTACK_BYTES))) as hostile:
            async with beside_an_honest_node(hostile) as fleet:
                before = most_memory_mib()
                honest = asyncio.create_task(stream(fleet, "honest", 60))
                async with track_longest_loop_turn() as turn:
                    attacked = asyncio.create_task(stream(fleet, "hostile", 1, path))
                    assert b'"done":true' in (await honest)[1]
                    # The gateway itself ends a stream of frames without a token.
                    await wait_until(
                        lambda: hostile.sent > 200 << 10 or attacked.done(), "the attack is under way, or has ended"
                    )
                    attacked.cancel()
                    await asyncio.gather(attacked, return_exceptions=True)
                    assert turn() < STALL_S
                assert most_memory_mib() - before < MEMORY_MIB

    run(check())


@both
@pytest.mark.parametrize("part", ["chunks of two bytes", "frames of tools", "events of tools"])
def test_many_hostile_answers_at_once_do_not_delay_other_streams(part: str, run: Run) -> None:
    start, unit = SMALL_PIECE_ANSWERS[part]
    path = "/v1/chat/completions" if b"event-stream" in start else "/api/chat"

    async def check() -> None:
        with HostileServer(ollama_with_attack(MODEL, lambda: repeat_bytes(start, unit, most=ATTACK_BYTES))) as hostile:
            async with beside_an_honest_node(hostile, at_once=32) as fleet:
                before = most_memory_mib()
                honest = asyncio.create_task(stream(fleet, "honest", 60))
                async with track_longest_loop_turn() as turn:
                    attacked = [asyncio.create_task(stream(fleet, "hostile", 1, path)) for _ in range(32)]
                    assert b'"done":true' in (await honest)[1]
                    await wait_until(lambda: hostile.paths.count(path) >= 8, "eight attacks are under way")
                    for task in attacked:
                        task.cancel()
                    await asyncio.gather(*attacked, return_exceptions=True)
                    assert turn() < 2 * STALL_S, (
                        "including the cost of its own 32 clients, which run in this process, too"
                    )
                assert most_memory_mib() - before < 2 * MEMORY_MIB

    run(check())


@pytest.mark.parametrize("part", COMPLETE_ANSWERS)
async def test_an_answer_of_millions_of_values_is_not_parsed(part: str) -> None:
    with HostileServer(ollama_with_attack(MODEL, lambda: iter([COMPLETE_ANSWERS[part]]))) as hostile:
        async with beside_an_honest_node(hostile) as fleet:
            before = most_memory_mib()
            async with track_longest_loop_turn() as turn:
                answer = await fleet.chat(headers={"X-GPUMesh-Node": "hostile"})
                assert answer.status_code in (200, 500, 502)
                assert turn() < STALL_S
            assert most_memory_mib() - before < 2 * MEMORY_MIB


@both
@pytest.mark.parametrize("part", ["empty lines", "small frames", "small nonsense", "a line without an end"])
def test_the_progress_of_a_pull_does_not_delay_other_streams(part: str, run: Run) -> None:
    start, unit = SMALL_PIECE_ANSWERS[part]

    async def check() -> None:
        with HostileServer(ollama_with_attack(MODEL, lambda: repeat_bytes(start, unit, most=ATTACK_BYTES))) as hostile:
            async with beside_an_honest_node(hostile) as fleet:
                before = most_memory_mib()
                honest = asyncio.create_task(stream(fleet, "honest", 60))
                async with track_longest_loop_turn() as turn:
                    pull = fleet.client.post(
                        "/api/pull", json={"model": "some:7b"}, headers={"X-GPUMesh-Node": "hostile"}
                    )
                    attacked = asyncio.ensure_future(pull)
                    assert b'"done":true' in (await honest)[1]
                    await wait_until(
                        lambda: "/api/pull" in hostile.paths and hostile.sent > 1 << 20, "it is being asked"
                    )
                    attacked.cancel()
                    await asyncio.gather(attacked, return_exceptions=True)
                    assert turn() < STALL_S
                assert most_memory_mib() - before < MEMORY_MIB

    run(check())
