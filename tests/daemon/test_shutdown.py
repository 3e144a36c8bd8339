from __future__ import annotations

import asyncio

from gpumesh.daemon.shutdown import Shutdown


async def test_the_first_request_sets_the_time_to_drain() -> None:
    stop = Shutdown()
    assert repr(stop) == "<Shutdown RUNNING drain 10 s>"
    stop.request(3.0)
    stop.request(60.0)
    assert repr(stop) == "<Shutdown REQUESTED drain 3 s>"
    await asyncio.wait_for(stop.wait(), 1)


async def test_a_later_request_may_end_draining_sooner() -> None:
    stop = Shutdown()
    stop.request_within(60.0)
    assert not stop.forced.is_set()
    stop.request_within(0.0)
    await asyncio.wait_for(stop.forced.wait(), 5)
    assert repr(stop) == "<Shutdown FORCED drain 60 s>"


async def test_forcing_is_a_request_without_draining() -> None:
    stop = Shutdown()
    stop.force()
    assert (stop.requested, stop.drain_s) == (True, 0.0)
