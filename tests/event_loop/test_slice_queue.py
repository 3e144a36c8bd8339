"""Whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

from gpumesh.event_loop.slice_queue import SliceQueue


async def test_one_step_a_turn_first_come_first_served() -> None:
    queue, taken, turns = SliceQueue(), [], 0

    def step(name: str, times: int) -> None:
        taken.append((name, turns))
        if times > 1:
            queue.add(lambda: step(name, times - 1))

    for name in ("a", "b"):
        queue.add(lambda name=name: step(name, 3))  # type: ignore[misc]
    while len(taken) < 6:
        await asyncio.sleep(0)
        turns += 1
    assert [name for name, _ in taken] == ["a", "b"] * 3
    assert len({turn for _, turn in taken}) == 6, "each in a turn of its own"


async def test_who_waits_for_a_turn_may_leave() -> None:
    queue, order = SliceQueue(), []

    async def waits(name: str) -> None:
        await queue.wait_turn()
        order.append(name)

    tasks = [asyncio.create_task(waits(name)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "c"]
    await asyncio.wait_for(queue.wait_turn(), 10)


async def test_a_step_that_fails_stops_no_other() -> None:
    queue, told = SliceQueue(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    def fail() -> None:
        raise ZeroDivisionError

    queue.add(fail)
    await asyncio.wait_for(queue.wait_turn(), 10)
    assert [type(error) for error in told] == [ZeroDivisionError]


@pytest.mark.parametrize("count", [1, 100])
async def test_everybody_has_a_turn(count: int) -> None:
    queue = SliceQueue()
    await asyncio.wait_for(asyncio.gather(*(queue.wait_turn() for _ in range(count))), 10)


async def test_of_all_long_work_one_piece_is_done_in_a_turn() -> None:
    work = SliceQueue()
    done: list[str] = []

    def steps(name: str, count: int) -> Generator[None, None, str]:
        for _ in range(count):
            done.append(name)
            yield
        return name

    results = await asyncio.gather(*(work.run(steps(name, 3)) for name in "abc"))
    assert results == ["a", "b", "c"]
    assert done[:6] == ["a", "b", "c", "a", "b", "c"], "in turn"
