"""Blocking calls in threads, and deadlines that can be paused."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gpumesh.tunnels.blocking import Deadline, run_in_thread


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_passes() -> None:
    clock = Clock()
    deadline = Deadline(5.0, clock)
    assert deadline.remaining_s == 5.0
    clock.now += 4.0
    assert (deadline.remaining_s, deadline.expired) == (1.0, False)
    clock.now += 4.0
    assert (deadline.remaining_s, deadline.expired) == (0.0, True)


def test_a_pause_does_not_count_up_to_its_limit() -> None:
    clock = Clock()
    deadline = Deadline(5.0, clock)
    clock.now += 1.0
    with deadline.paused(60.0):
        assert not deadline.expired
        clock.now += 20.0
        assert not deadline.expired
    assert deadline.remaining_s == 4.0
    with deadline.paused(60.0):
        clock.now += 61.0
    assert deadline.remaining_s == 3.0

    def fail() -> None:
        with deadline.paused(60.0):
            clock.now += 7.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert deadline.remaining_s == 3.0


async def test_a_call_returns_its_result_or_raises_its_error() -> None:
    assert await run_in_thread(divmod, 7, 2) == (3, 1)

    def quit_all() -> None:
        raise SystemExit(3)

    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 7, 0)
    with pytest.raises(SystemExit):
        await run_in_thread(quit_all)


async def test_a_call_that_hangs_delays_no_other_call() -> None:
    go, left = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        go.wait(30)
        loop.call_soon_threadsafe(left.set)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await run_in_thread(hang)
    # There is no pool: any number of calls may hang without delaying another.
    hanging = [asyncio.create_task(run_in_thread(hang)) for _ in range(100)]
    assert await asyncio.wait_for(run_in_thread(divmod, 7, 2), 20) == (3, 1)
    go.set()
    async with asyncio.timeout(20):
        await left.wait()
        await asyncio.gather(*hanging)


def test_a_call_that_outlives_its_loop_raises_nothing() -> None:
    go = threading.Event()

    async def leave() -> None:
        task = asyncio.create_task(run_in_thread(go.wait, 30))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    threads = [thread for thread in threading.enumerate() if thread.name == "wait"]
    go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
