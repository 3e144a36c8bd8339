"""``send_in_window`` with a stand-in for the mesh that answers at once: what it holds, and in which order it yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count

import pytest

from gpumesh.daemon.sessions.prompt_window import send_in_window
from gpumesh.event_loop.async_iterators import closing_iterator


class Prompts:
    """Numbers as prompts. ``taken`` is how many of them were read, ``under_way`` how many are being sent."""

    def __init__(self, prompt_count: int | None = None) -> None:
        self.prompt_count = prompt_count
        self.taken = 0
        self.under_way = 0
        self.most_under_way = 0
        self.cancelled = 0

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in count() if self.prompt_count is None else range(self.prompt_count):
            self.taken += 1
            yield number

    async def send(self, number: int, wait: Callable[[int], Awaitable[object]]) -> int:
        """The result, which is the number itself, after ``wait``."""
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await wait(number)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
        return number


async def yield_some_times(number: int) -> None:
    """Lets others go first, differently often for each number: prompts end in another order than they begin."""
    for _ in range(number % 7):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ordered", [True, False])
async def test_fifty_thousand_prompts_hold_a_bounded_part(ordered: bool) -> None:
    prompts = Prompts(50_000)
    most_held = yielded = 0
    results = []
    async with asyncio.TaskGroup() as group:
        async for result in send_in_window(
            aiter(prompts),
            lambda number: prompts.send(number, yield_some_times),
            group=group,
            concurrency=16,
            most_waiting=100,
            ordered=ordered,
        ):
            most_held = max(most_held, prompts.taken - yielded)
            yielded += 1
            results.append(result)
    assert (results == list(range(50_000))) == ordered
    assert sorted(results) == list(range(50_000)), "each exactly once"
    assert 8 < prompts.most_under_way <= 16
    assert most_held <= 100 + 16


async def test_others_go_on_behind_a_slow_prompt_until_their_results_weigh_too_much() -> None:
    """Each result weighs 10. So 10 of them may wait, and those that are under way then."""
    prompts = Prompts(1000)
    first_may_end = asyncio.Event()

    async def wait(number: int) -> None:
        await (first_may_end.wait() if number == 0 else asyncio.sleep(0))

    async with asyncio.TaskGroup() as group:
        results = send_in_window(
            aiter(prompts),
            lambda number: prompts.send(number, wait),
            group=group,
            concurrency=4,
            most_waiting=100,
            weigh=lambda _: 10,
        )
        async with closing_iterator(results) as closing:
            first = asyncio.ensure_future(anext(closing))
            for _ in range(200):
                await asyncio.sleep(0)
            assert 1 + 10 <= prompts.taken <= 1 + 10 + 3, "the first, those that wait, those that were under way"
            first_may_end.set()
            assert await first == 0
            assert [result async for result in closing] == list(range(1, 1000)), "nothing is lost"


async def test_a_reader_that_ends_early_cancels_what_is_under_way() -> None:
    prompts = Prompts()

    async def wait(number: int) -> None:
        await asyncio.sleep(0 if number == 0 else 3600)

    async with asyncio.TaskGroup() as group:
        results = send_in_window(
            aiter(prompts), lambda number: prompts.send(number, wait), group=group, concurrency=3, most_waiting=100
        )
        async with closing_iterator(results) as closing:
            assert await anext(closing) == 0
    assert prompts.under_way == 0
    assert prompts.cancelled == 2


async def test_an_error_comes_in_its_place_and_ends_the_others() -> None:
    prompts = Prompts()

    async def wait(number: int) -> None:
        if number == 2:
            raise ValueError("a wrong prompt")
        await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        results = send_in_window(
            aiter(prompts), lambda number: prompts.send(number, wait), group=group, concurrency=3, most_waiting=100
        )
        assert [await anext(results), await anext(results)] == [0, 1]
        with pytest.raises(ValueError, match="a wrong prompt"):
            await anext(results)
    assert prompts.under_way == 0


async def test_a_group_that_ends_ends_the_iterator() -> None:
    """The tasks of the group are cancelled, also those that have not begun. The iterator does not wait for them."""
    prompts = Prompts()

    async def wait(_: int) -> None:
        await asyncio.sleep(3600)

    async def read(group: asyncio.TaskGroup) -> None:
        async for _ in send_in_window(
            aiter(prompts), lambda number: prompts.send(number, wait), group=group, concurrency=3, most_waiting=100
        ):
            raise AssertionError("no prompt ends")

    async def fail() -> None:
        raise OSError("the mesh has ended")

    with pytest.raises(ExceptionGroup):  # noqa: PT012 - the group raises at its end
        async with asyncio.TaskGroup() as group:
            reader = asyncio.ensure_future(read(group))
            await asyncio.sleep(0)
            group.create_task(fail())
    _, waiting = await asyncio.wait([reader], timeout=5)
    assert not waiting
    assert reader.cancelled()
    assert prompts.under_way == 0
