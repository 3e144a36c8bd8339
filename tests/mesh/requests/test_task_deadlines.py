from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from gpumesh.mesh.requests.task_deadlines import CHECK_S, TaskDeadline, TaskDeadlines
from tests.lab.virtual_time import run_in_virtual_time


@pytest.fixture
async def deadlines() -> TaskDeadlines:
    return TaskDeadlines(asyncio.get_running_loop())


async def test_a_block_that_takes_too_long_raises_timeout_error(deadlines: TaskDeadlines) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError), TaskDeadline(deadlines, 0.02):
        await asyncio.sleep(30)
    assert time.monotonic() - started < CHECK_S  # a short deadline is not rounded up to the next check
    assert repr(deadlines) == "<TaskDeadlines 0 running>"
    await asyncio.sleep(0)  # the task is not cancelled any more


async def test_a_block_that_ends_in_time_is_left_alone(deadlines: TaskDeadlines) -> None:
    with TaskDeadline(deadlines, 0.02) as deadline:
        await asyncio.sleep(0)
    assert repr(deadline) == "<TaskDeadline not running>"
    await asyncio.sleep(0.04)
    assert not deadline.expired
    deadline.expire()  # too late: nothing happens
    assert not deadline.expired


def test_several_deadlines_end_each_at_its_time() -> None:
    async def wait_for_all(clock: Callable[[], float]) -> list[tuple[float, Any]]:
        deadlines = TaskDeadlines(asyncio.get_running_loop())
        ended: list[tuple[float, Any]] = []

        async def wait(timeout_s: float) -> None:
            try:
                with TaskDeadline(deadlines, timeout_s):
                    await asyncio.sleep(30)
            except TimeoutError:
                ended.append((timeout_s, pytest.approx(clock())))

        async with asyncio.TaskGroup() as group:
            for timeout_s in (3.5 * CHECK_S, 0.02, 0.04):
                group.create_task(wait(timeout_s))
        return ended

    assert run_in_virtual_time(wait_for_all) == [(0.02, 0.02), (0.04, 0.04), (3.5 * CHECK_S, 3.5 * CHECK_S)]


async def test_expire_ends_the_block_at_once(deadlines: TaskDeadlines) -> None:
    deadline = TaskDeadline(deadlines, 600)
    asyncio.get_running_loop().call_soon(deadline.expire)
    with pytest.raises(TimeoutError), deadline:
        await asyncio.sleep(30)
    assert repr(deadline) == "<TaskDeadline expired>"


async def test_a_cancellation_from_outside_stays_one(deadlines: TaskDeadlines) -> None:
    async def wait() -> None:
        with TaskDeadline(deadlines, 600) as deadline:
            deadline.expire()
            task.cancel()  # in the same turn of the loop as the deadline
            await asyncio.sleep(30)

    task = asyncio.create_task(wait())
    await asyncio.wait([task])
    assert task.cancelled()


async def test_an_error_in_the_block_is_not_replaced(deadlines: TaskDeadlines) -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            raise KeyError

    deadline = TaskDeadline(deadlines, 0.01)
    with pytest.raises(KeyError), deadline:
        await fail_when_cancelled()
    assert deadline.expired
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_deadline_in_a_deadline(deadlines: TaskDeadlines) -> None:
    with TaskDeadline(deadlines, 600):
        with pytest.raises(TimeoutError), TaskDeadline(deadlines, 0.01):
            await asyncio.sleep(30)
        await asyncio.sleep(0)
