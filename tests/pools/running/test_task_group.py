from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import pytest

from gpumesh.errors import PoolFailed
from gpumesh.pools.running.task_group import error_group


async def fail(error: Exception) -> None:
    raise error


async def run_together(*work: Coroutine[None, None, None]) -> None:
    async with error_group() as group:
        for coroutine in work:
            group.create_task(coroutine)
        await asyncio.Event().wait()


async def test_the_error_that_names_a_node_is_raised_also_from_a_group_inside() -> None:
    named = PoolFailed("the worker on b has ended", node="b")

    async def fail_inside() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(named))

    with pytest.raises(PoolFailed) as caught:
        await run_together(fail(PoolFailed("llama-server has ended")), fail_inside())
    assert caught.value is named


async def test_a_bug_is_not_hidden_and_a_cancellation_stays_one() -> None:
    with pytest.raises(ZeroDivisionError):
        await run_together(fail(PoolFailed("ended", node="b")), fail(ZeroDivisionError()))
    task = asyncio.create_task(run_together())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
