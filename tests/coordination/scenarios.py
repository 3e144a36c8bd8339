"""What several gateways over one Redis must do, as scenarios that return figures. benchmarks/several_gateways.py prints
the figures of long ones; tests/real/test_several_gateways.py asserts those of short ones."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random

from tests.coordination.mesh_processes import GatewayProcess, Reply, SteadyLoad, percentile, wait_for
from tests.coordination.redis_server import RedisServer
from tests.coordination.slot_server import SlotServer


@dataclass(frozen=True)
class Steady:
    """``waited``: the requests that waited in a server for a slot; ``busy``: the mean share of the slots in use."""

    sent: int
    failures: list[str]
    waited: int
    most_waiting: int
    p50_ms: float
    p99_ms: float


async def steady_load(
    gateways: Sequence[GatewayProcess], servers: Sequence[SlotServer], *, rate: float, answer_ms: int, seconds: float
) -> Steady:
    """All gateways get requests at the same rate."""
    for server in servers:
        server.forget()
    load = SteadyLoad(gateways, rate, answer_ms)
    async with load.running():
        await asyncio.sleep(seconds)
    times_ms = [reply.took_ms for reply in load.replies]
    return Steady(
        load.sent,
        load.failures(),
        sum(server.waited for server in servers),
        max(server.most_waiting for server in servers),
        percentile(times_ms, 0.5),
        percentile(times_ms, 0.99),
    )


@dataclass(frozen=True)
class Order:
    """``overtaken``: for each interactive request, how many batch requests that were sent before it got a slot after
    it. ``interactive_ms``: how long the interactive requests took; ``batch_wall_s``: until the batch was done."""

    failures: list[str]
    waited: int
    overtaken: list[int]
    interactive_ms: list[float]
    batch_wall_s: float
    ideal_s: float


async def interactive_beside_batch(
    gateways: Sequence[GatewayProcess], servers: Sequence[SlotServer], *, batch: int, answer_ms: int, interactive: int
) -> Order:
    """The first gateway has ``batch`` waiting batch requests. Interactive requests come to the last one."""
    for server in servers:
        server.forget()
    began = time.perf_counter()
    slots = sum(server.slots for server in servers)
    ideal_s = (batch + interactive) * answer_ms / 1000 / slots
    async with asyncio.TaskGroup() as tasks:
        waiting = [
            tasks.create_task(gateways[0].ask(f"batch-{number}", answer_ms=answer_ms, priority="batch"))
            for number in range(batch)
        ]
        await asyncio.sleep(ideal_s / 8)
        urgent: list[Reply] = []
        for number in range(interactive):
            urgent.append(await gateways[-1].ask(f"urgent-{number}", answer_ms=answer_ms, priority="interactive"))
    replies = [task.result() for task in waiting]
    wall_s = time.perf_counter() - began
    overtaken = []
    ended_at = {reply.prompt: reply.ended_at for reply in replies}
    for reply in urgent:
        overtaken.append(sum(ended > reply.ended_at for ended in ended_at.values()))
    return Order(
        [f"{reply.status} {reply.body}" for reply in (*replies, *urgent) if reply.status != 200],
        sum(server.waited for server in servers),
        overtaken,
        [reply.took_ms for reply in urgent],
        wall_s,
        ideal_s,
    )


async def kill_gateway(
    gateways: list[GatewayProcess], servers: Sequence[SlotServer], *, answer_ms: int
) -> tuple[float | None, list[str]]:
    """Kills the last gateway, while all have more requests than there are slots. Returns the seconds until all slots
    are in use again, and what failed at the others. The killed gateway is removed from the list."""
    slots = sum(server.slots for server in servers)
    load = SteadyLoad(gateways, 1.1 * slots / (answer_ms / 1000), answer_ms)

    async def all_were_in_use() -> bool:
        return all(server.most_running == server.slots for server in servers)

    async with load.running():
        await asyncio.sleep(0.5)
        victim = gateways.pop()
        load.gateways = tuple(gateways)
        victim.kill()
        await asyncio.sleep(0.05)  # its connections have ended
        for server in servers:
            server.forget()
        free_s = await wait_for(all_were_in_use, limit_s=10.0)
        await asyncio.sleep(0.2)
    return free_s, load.failures(ignored=[victim.number])


async def clients_that_leave(
    gateways: Sequence[GatewayProcess], servers: Sequence[SlotServer], *, count: int, answer_ms: int, seed: int = 1
) -> list[str]:
    """Sends more requests at once than there are slots, each second of which is given up at any moment of its life.
    Returns what failed. Afterwards no gateway may hold a place: a load as in ``kill_gateway`` would find all slots."""
    rng = Random(seed)
    slots = sum(server.slots for server in servers)
    seconds = count * answer_ms / 1000 / slots / 2  # a half of the requests need their slots

    async def ask(number: int) -> Reply | None:
        await asyncio.sleep(rng.random() * seconds)
        asking = asyncio.create_task(gateways[number % len(gateways)].ask(f"leaves-{number}", answer_ms=answer_ms))
        if number % 2:
            await asyncio.sleep(rng.random() * 2 * answer_ms / 1000)
            asking.cancel()
        await asyncio.wait([asking])
        return None if asking.cancelled() else asking.result()

    replies = await asyncio.gather(*(ask(number) for number in range(count)))
    return [f"{reply.status} {reply.body}" for reply in replies if reply is not None and reply.status != 200]


@dataclass(frozen=True)
class Outage:
    """``noticed_s``: until all gateways said that Redis is away (``None``: they did not within 5 s). ``back_s``: from
    the return of Redis until none says so. ``waited_after``: how many requests waited in a server after that.
    ``p50_ms`` and ``p50_away_ms``: of all requests, before the outage and in it."""

    sent: int
    failures: list[str]
    noticed_s: float | None
    back_s: float | None
    waited_after: int
    p50_ms: float
    p50_away_ms: float
    p99_away_ms: float


async def lose_redis(
    gateways: Sequence[GatewayProcess],
    servers: Sequence[SlotServer],
    *,
    lose: Callable[[], Awaitable[None]],
    restore: Callable[[], Awaitable[None]],
    rate: float,
    answer_ms: int,
    away_s: float,
    before_s: float = 1.0,
    after_s: float = 1.0,
) -> Outage:
    """Redis goes away and comes back under load."""

    async def all_say_so() -> bool:
        return all(["redis-away" in await gateway.findings() for gateway in gateways])

    async def none_says_so() -> bool:
        return not any(["redis-away" in await gateway.findings() for gateway in gateways])

    load = SteadyLoad(gateways, rate, answer_ms)
    async with load.running():
        await asyncio.sleep(before_s)
        lost_at = time.perf_counter()
        await lose()
        noticed_s = await wait_for(all_say_so, limit_s=5.0) if away_s else None
        await asyncio.sleep(max(away_s - (time.perf_counter() - lost_at), 0.0))
        restored_at = time.perf_counter()
        await restore()
        back_s = await wait_for(none_says_so, limit_s=10.0)
        await asyncio.sleep(4 * answer_ms / 1000)  # what was sent meanwhile has ended
        for server in servers:
            server.forget()
        await asyncio.sleep(after_s)
        waited_after = sum(server.waited for server in servers)
    before = [reply.took_ms for reply in load.replies if reply.ended_at < lost_at]
    away = [reply.took_ms for reply in load.replies if lost_at <= reply.sent_at < restored_at]
    return Outage(
        load.sent,
        load.failures(),
        noticed_s,
        back_s,
        waited_after,
        percentile(before, 0.5),
        percentile(away, 0.5),
        percentile(away, 0.99),
    )


def outages(redis: RedisServer) -> dict[str, tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]]:
    """How Redis goes away and comes back, by name."""

    async def stop() -> None:
        redis.stop()

    async def hang() -> None:
        redis.send(signal.SIGSTOP)

    async def go_on() -> None:
        redis.send(signal.SIGCONT)

    async def flush() -> None:
        redis.client().flushall()

    async def nothing() -> None:
        pass

    return {"stopped": (stop, redis.start), "hung": (hang, go_on), "flushed": (flush, nothing)}


async def sequential_ms(gateway: GatewayProcess, *, count: int, answer_ms: int) -> list[float]:
    """How long requests take that are sent one after the other."""
    return [(await gateway.ask(f"one-{number}", answer_ms=answer_ms)).took_ms for number in range(count)]
