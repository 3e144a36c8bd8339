"""A request that costs no inference neither waits for a slot nor takes one."""

from __future__ import annotations

import asyncio

from gpumesh.balancer.breaker import Breaker
from tests.gateway.fleet import MODEL, quick_host, serve_hosts
from tests.tunnels.polling import wait_until

SLOW = quick_host("slow", tokens_per_s=20.0, answer_tokens=(2000, 2000))


async def test_it_is_answered_while_all_slots_are_taken() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet:
        running, waiting = asyncio.create_task(fleet.chat()), asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.mesh.snapshot().gateway.queued == 1, "one runs, one waits")
        assert (await fleet.client.post("/api/show", json={"model": MODEL})).status_code == 200
        assert fleet.mesh.snapshot().node("slow").load.in_flight == 1
        running.cancel()
        waiting.cancel()


async def test_it_waits_for_a_node_that_will_be_back_and_not_for_a_slot() -> None:
    async with serve_hosts(SLOW, max_parallel=1) as fleet:
        running = asyncio.create_task(fleet.chat())
        await wait_until(lambda: fleet.count_running() == 1, "it has the only slot")
        ledger = fleet.mesh.fleet["slow"].ledger
        ledger.breaker = Breaker().trip(asyncio.get_running_loop().time())
        answer = await fleet.client.post("/api/show", json={"model": MODEL})
        assert answer.status_code == 200, "after the breaker's pause"
        assert not running.done()
        assert (fleet.mesh.snapshot().node("slow").load.in_flight, ledger.served) == (1, 0)
        running.cancel()
