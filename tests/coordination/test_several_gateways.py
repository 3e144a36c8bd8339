"""Gateways that share places over a real Redis: who gets a place, and how a key passes from one gateway to several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpumesh.balancer.base import Priority
from tests.coordination.redis_server import KEY, SHORT, Gateway, RedisServer, gateway, redis_server, request
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, needs("redis-server")]

INTERACTIVE = request(priority=Priority.INTERACTIVE)
BATCH = request(priority=Priority.BATCH)


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(tmp_path) as server:
        yield server


async def pass_place_on(*gateways: Gateway) -> Gateway:
    """Frees the only place when all announcements have arrived. Returns the gateway that gets it."""
    [holder] = [gate for gate in gateways if gate.held]
    before = sum(len(gate.placed) for gate in gateways)
    await asyncio.sleep(0.02)
    holder.release()
    await wait_until(lambda: sum(len(gate.placed) for gate in gateways) > before, "a waiting request is placed")
    [winner] = [gate for gate in gateways if gate.held]
    return winner


async def test_the_only_user_of_a_key_takes_places_without_asking(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url):
        assert one.places.take_now(KEY) is None, "the first time it must ask"
        assert await one.take()
        commands = redis.client().info("commandstats")["cmdstat_evalsha"]["calls"]
        assert all(one.places.take_now(KEY) for _ in range(100))
        assert redis.client().info("commandstats")["cmdstat_evalsha"]["calls"] - commands < 10, "heartbeats only"
        assert one.places.shared_keys() == []
        await asyncio.sleep(SHORT.own_s * 2)
        assert one.places.take_now(KEY), "its heartbeats keep the key"


async def test_a_second_user_makes_the_first_one_share(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take(request(2))
        assert await two.take(request(2)), "there is a second place"
        assert not await two.take(request(2))
        assert not await one.take(request(2))
        assert one.places.shared_keys() == two.places.shared_keys() == [KEY]
        assert one.places.others_in_flight(KEY, 1, 2) == two.places.others_in_flight(KEY, 1, 2) == 1
        assert await two.take(request(None)), "a node without a limit takes any number"


async def test_a_place_that_others_do_not_want_any_more_is_used_alone_again(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take()
        assert not await two.take()
        await wait_until(lambda: one.places.shared_keys() == [], "the other one has not used it for a while")
        one.release()
        await asyncio.sleep(SHORT.heartbeat_s * 3)
        assert one.places.take_now(KEY)
        assert two.has_room(2), "it may ask for a place"
        assert await two.take(request(2))


async def test_a_freed_place_goes_to_the_best_request_of_all_gateways(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two, gateway(redis.url) as three:
        assert await one.take()
        assert not await two.take()
        one.wait(BATCH, BATCH)
        two.wait(request(waited_s=1.0))
        three.wait(INTERACTIVE, request(waited_s=2.0))
        order = []
        for _ in range(5):
            winner = await pass_place_on(one, two, three)
            order.append((winner is three, winner.placed[-1].priority))
        assert order == [
            (True, Priority.INTERACTIVE),
            (True, Priority.NORMAL),
            (False, Priority.NORMAL),
            (False, Priority.BATCH),
            (False, Priority.BATCH),
        ]
        assert max(gate.most_held for gate in (one, two, three)) == 1


async def test_the_client_served_least_goes_first(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take(request(client="ann"))
        assert not await two.take()
        one.wait(*[request(client="ann", waited_s=9.0)] * 3)
        two.wait(*[request(client="bob")] * 3)
        order = []
        for _ in range(6):
            order.append("ann" if await pass_place_on(one, two) is one else "bob")
        assert sorted(order[:2]) == sorted(order[2:4]) == ["ann", "bob"], "they take turns"


async def test_a_batch_gets_one_place_of_17(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take()
        assert not await two.take()
        two.wait(BATCH)
        one.wait(*[request(client=f"c{number}", waited_s=1.0 - number / 100) for number in range(20)])
        for _ in range(17):
            assert not two.held
            await pass_place_on(one, two)
        assert two.held
        assert len(one.placed) == 16


async def test_a_place_that_nobody_takes_goes_to_another_gateway(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two, gateway(redis.url) as three:
        assert await one.take()
        assert not await two.take()
        two.places.announce(KEY, [INTERACTIVE])  # but its request has gone elsewhere
        three.wait(BATCH)
        await asyncio.sleep(0.03)
        one.release()
        await wait_until(lambda: three.held == 1, "it gets the place")
        assert two.held == 0


async def test_a_cancelled_take_gives_its_place_back(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take()
        assert not await two.take()
        one.release()
        for turns in range(8):  # until the answer has come, and after it
            task = asyncio.create_task(two.places.take(KEY, request()))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            [answer] = await asyncio.gather(task, return_exceptions=True)
            if answer is True:  # it had ended before
                two.places.release(KEY, Priority.NORMAL, "ann")
        one.wait(request())
        await wait_until(lambda: one.held == 1, "the place is free")
        assert two.places._places.held() == {}


async def test_a_take_that_is_cancelled_just_before_its_answer_gives_its_place_back(redis: RedisServer) -> None:
    async with gateway(redis.url) as one:
        task = asyncio.create_task(one.places.take(KEY, request()))
        await asyncio.sleep(0)
        task.cancel()  # it has not run since, when the answer comes
        one.places._places.go_alone()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert one.places._places.held() == {}


async def test_a_gateway_that_ends_leaves_its_places_at_once(redis: RedisServer) -> None:
    timing = replace(SHORT, dead_s=60.0, own_s=50.0)
    async with gateway(redis.url, timing=timing) as two:
        async with gateway(redis.url, timing=timing) as one:
            assert await one.take()
            assert not await two.take()
            two.wait(request())
            await asyncio.sleep(0.03)
        await wait_until(lambda: two.held == 1, "its place is free")


async def test_after_a_flush_all_gateways_tell_at_once_what_they_hold(redis: RedisServer) -> None:
    timing = replace(SHORT, heartbeat_s=60.0, dead_s=90.0, own_s=80.0)
    async with gateway(redis.url, timing=timing) as one, gateway(redis.url, timing=timing) as two:
        assert await one.take()
        assert not await two.take()
        redis.client().flushall()
        two.places.exchange.send("topic", "any step")
        await wait_until(lambda: two.places._places.session == 2 and one.places._places.session == 2, "both are back")
        await wait_until(lambda: two.is_joined and one.is_joined, "both have joined")
        assert not await two.take()


async def test_meshes_of_other_names_share_nothing(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url, mesh="other") as two:
        assert await one.take()
        assert await two.take()
        assert one.places.exchange.other_gateways() == frozenset()


async def test_what_redis_stores_expires_and_names_no_client(redis: RedisServer) -> None:
    client = redis.client(decode_responses=True)
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await one.take(request(client="ann@example.org"))
        assert not await two.take(request(client="bob@example.org"))
        two.wait(request(client="bob@example.org"))
        two.places.exchange.set_fact("topic", "text")
        await asyncio.sleep(SHORT.heartbeat_s * 3)
        keys = [str(key) for key in client.keys("gpumesh*")]
        assert all(key.startswith("gpumesh:1:{mesh}:") for key in keys)
        assert [key for key in keys if not 0 < client.ttl(key) <= 3600] == []
        stored = str([client.dump(key) if client.type(key) != "string" else client.get(key) for key in keys])
        assert "example" not in stored


async def test_messages_and_facts_reach_the_others(redis: RedisServer) -> None:
    heard: list[tuple[str, str]] = []
    changes: list[int] = []
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        one_exchange, two_exchange = one.places.exchange, two.places.exchange
        two_exchange.listen("topic", lambda sender, text: heard.append((sender, text)))
        one_exchange.listen("topic", lambda sender, text: heard.append((sender, "own")))
        two_exchange.follow_facts(lambda: changes.append(1))
        one_exchange.send("topic", "hello")
        one_exchange.send("other", "nobody listens")
        await wait_until(lambda: heard == [(one_exchange.gateway, "hello")], "the message has come")
        one_exchange.set_fact("fact", "known")
        await wait_until(lambda: two_exchange.facts("fact") == {one_exchange.gateway: "known"}, "the fact is known")
        assert two_exchange.other_gateways() == {one_exchange.gateway}
        assert changes
        async with gateway(redis.url) as late:
            await wait_until(lambda: late.places.exchange.facts("fact") != {}, "it reads what was there")
            redis.client().flushall()
            await wait_until(lambda: late.places.exchange.facts("fact") != {}, "it is told again")
        one_exchange.set_fact("fact", None)
        await wait_until(lambda: two_exchange.facts("fact") == {}, "the fact is gone")
        with pytest.raises(ValueError, match="longer"):
            one_exchange.send("topic", "x" * 100_000)


async def test_a_held_place_counts_for_the_others_also_beyond_the_limit(redis: RedisServer) -> None:
    async with gateway(redis.url) as one, gateway(redis.url) as two:
        assert await two.take(request(2))
        one.places.hold(KEY)
        one.places.hold(KEY)
        two.release()
        await wait_until(lambda: two.places.others_in_flight(KEY, 0, None) == 2, "both are counted")
        assert not await two.take(request(2))
