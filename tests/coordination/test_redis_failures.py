"""What happens when Redis goes, hangs, forgets or refuses: each gateway goes on alone at once, and comes back."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.coordination.redis_server import (
    KEY,
    SHORT,
    Gateway,
    RedisServer,
    free_port,
    gateway,
    redis_server,
    request,
)
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


@asynccontextmanager
async def sharing_gateways(url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two gateways that share a key with one place, which the first one holds."""
    async with gateway(url) as one, gateway(url) as two:
        assert await one.take()
        assert not await two.take()
        yield one, two


async def check_sharing(one: Gateway, two: Gateway) -> None:
    """Fails unless the gateways share the only place again. The first one holds a place; the second one may hold one
    that it took while it was alone."""
    await wait_until(lambda: one.is_joined and two.is_joined and not one.problem, "both have joined again")
    await wait_until(lambda: not two.has_room(1), "it knows of the place of the first one")
    while two.held:
        two.release()
    assert not await two.take()
    two.wait(request())
    await asyncio.sleep(0.05)
    one.release()
    await wait_until(lambda: two.held == 1, "it gets the freed place")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_redis_that_is_stopped_or_hangs(redis: RedisServer, how: signal.Signals) -> None:
    async with sharing_gateways(redis.url) as (one, two):
        redis.send(how)
        started_at = asyncio.get_running_loop().time()
        assert await two.take(), "it goes on alone"
        assert asyncio.get_running_loop().time() - started_at < 5.0
        assert two.places.take_now(KEY), "nothing is asked any more"
        two.places.release(KEY, request().priority, "ann")
        await wait_until(lambda: bool(one.problem), "the other one notices too")
        assert [finding.code for finding in one.places.findings()] == ["redis-away"]
        if how is signal.SIGSTOP:
            redis.send(signal.SIGCONT)
        else:
            redis.stop()
            await redis.start()
        await check_sharing(one, two)
        assert one.places.findings() == ()


async def test_a_waiting_take_is_granted_when_redis_goes(redis: RedisServer) -> None:
    async with sharing_gateways(redis.url) as (_, two):
        redis.send(signal.SIGSTOP)
        takes = [asyncio.create_task(two.places.take(KEY, request())) for _ in range(20)]
        assert await asyncio.gather(*takes) == [True] * 20


async def test_waiting_requests_are_placed_when_redis_goes(redis: RedisServer) -> None:
    async with sharing_gateways(redis.url) as (_, two):
        two.wait(request())
        redis.stop()
        await wait_until(lambda: two.held == 1, "it goes on alone")


@pytest.mark.parametrize("command", ["FLUSHALL", "SCRIPT FLUSH"])
async def test_redis_that_forgets(redis: RedisServer, command: str) -> None:
    async with sharing_gateways(redis.url) as (one, two):
        if command == "FLUSHALL":
            redis.client().flushall()
        else:
            redis.client().script_flush()
        await asyncio.gather(one.take(request(2)), two.take(request(2)))
        assert one.problem == two.problem == "", "this is no outage"
        assert one.held + two.held >= 2
        while one.held > 1:
            one.release()
        await check_sharing(one, two)
        assert one.problem == two.problem == ""


async def test_redis_that_becomes_a_replica_takes_nothing(redis: RedisServer) -> None:
    async with sharing_gateways(redis.url) as (one, two):
        redis.client().replicaof("127.0.0.1", str(free_port()))
        assert await two.take(), "it goes on alone"
        await wait_until(lambda: "read only" in one.problem, "the problem is named")
        redis.client().replicaof("NO", "ONE")
        await check_sharing(one, two)


async def test_redis_without_memory(redis: RedisServer) -> None:
    async with sharing_gateways(redis.url) as (one, two):
        redis.client().config_set("maxmemory", "1")
        assert await two.take(), "it goes on alone"
        await wait_until(lambda: "memory" in one.problem, "the problem is named")
        redis.client().config_set("maxmemory", "0")
        await check_sharing(one, two)


async def test_redis_that_evicts_what_it_stored(redis: RedisServer) -> None:
    client = redis.client()
    async with sharing_gateways(redis.url) as (one, two):
        for key in (f"node:{KEY}", f"mail:{two.places.exchange.gateway}", "served:1", "gateways"):
            client.delete("gpumesh:1:{mesh}:" + key)
            await asyncio.sleep(SHORT.heartbeat_s * 3)
            assert not await two.take()
        await check_sharing(one, two)
        assert one.problem == two.problem == ""


async def test_a_slow_redis_costs_time_and_a_very_slow_one_is_away(redis: RedisServer, tmp_path: Path) -> None:
    delay_s = 0.05
    patient = replace(SHORT, answer_s=0.8)
    async with (
        slow_redis(redis, tmp_path / "slow.sock", lambda: delay_s) as url,
        gateway(redis.url) as one,
        gateway(url, timing=patient) as two,
    ):
        assert await one.take()
        assert not await two.take()
        assert two.problem == ""
        delay_s = patient.answer_s + 0.1
        assert await two.take(), "it goes on alone"
        assert "in time" in two.problem
        delay_s = 0.0
        await check_sharing(one, two)


async def test_a_password_that_is_wrong_or_missing_is_a_problem_that_does_not_name_it(tmp_path: Path) -> None:
    async with redis_server(tmp_path, "--requirepass", "open-sesame") as server:
        async with gateway(server.url, password=lambda: "wrong-word", joins=False) as one:
            await wait_until(lambda: one.problem != "", "it is refused")
            assert "wrong-word" not in one.problem
            assert one.places.take_now(KEY), "it goes on alone"
        words = iter([None, "wrong-word", "open-sesame"])
        async with gateway(server.url, password=lambda: next(words)) as two:
            assert two.problem == "", "the password is read at each connect"


async def test_a_gateway_process_that_is_stopped_continued_and_killed(redis: RedisServer) -> None:
    command = (sys.executable, "-m", "tests.coordination.gateway_process", redis.url)
    async with gateway(redis.url) as one:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert await process.stdout.readline() == b"PLACE yes \n"
            one.wait(request())
            process.send_signal(signal.SIGSTOP)
            await wait_until(lambda: one.held == 1, "the place of a gateway that is silent is free")
            process.send_signal(signal.SIGCONT)
            process.stdin.write(b"the request has ended\n")
            assert await process.stdout.readline() == b"PLACE no \n", "it has noticed that it was taken for dead"
            one.release()
            while await process.stdout.readline() != b"PLACE yes \n":
                pass
            one.wait(request())
            await asyncio.sleep(SHORT.dead_s)
            assert one.held == 0, "a gateway that lives keeps its place"
            process.kill()
            await wait_until(lambda: one.held == 1, "the place of a gateway that was killed is free")
            assert one.problem == ""
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_a_gateway_whose_machine_slept_asks_before_it_takes(redis: RedisServer) -> None:
    """When it goes on, others may have its places."""
    silent, alert = replace(SHORT, heartbeat_s=1000.0, dead_s=0.3, own_s=5.0), replace(SHORT, dead_s=0.3)
    async with gateway(redis.url, timing=silent) as one, gateway(redis.url, timing=alert) as two:
        assert await one.take()
        assert one.places.take_now(KEY)
        await wait_until(lambda: two.places.exchange.other_gateways() == frozenset(), "it is taken for dead")
        assert await two.take()
        one.slept_s = 6.0  # its event loop runs again, and no answer of Redis has been read yet
        assert one.places.take_now(KEY) is None
        assert not await one.take(), "it has registered again, and the place is the other one's"
        assert one.problem == ""
        await wait_until(lambda: len(two.places.exchange.other_gateways()) == 1, "it is there again")


@asynccontextmanager
async def slow_redis(redis: RedisServer, path: Path, delay_s: object) -> AsyncIterator[str]:
    """Forwards to Redis; each answer comes later by ``delay_s()``."""
    assert callable(delay_s)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_slow: bool) -> None:
        try:
            while data := await reader.read(65536):
                if is_slow:
                    await asyncio.sleep(delay_s())
                writer.write(data)
        finally:
            writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_unix_connection(redis.url.removeprefix("unix://"))
        pumps = pump(reader, redis_writer, is_slow=False), pump(redis_reader, writer, is_slow=True)
        await asyncio.gather(*pumps, return_exceptions=True)
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_unix_server(forward, path)
    try:
        yield f"unix://{path}"
    finally:
        server.close()
        await ended.wait()
        await asyncio.sleep(0.05)  # until the last connections are closed
