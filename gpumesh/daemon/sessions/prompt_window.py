"""Sends any number of prompts with bounded memory, for `run -f` and for ``run_many`` of the library.

Few prompts are under way at a time. In the order of the prompts, a result waits for all results before it; when too
many results wait, no more prompts are begun.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

P = TypeVar("P")
R = TypeVar("R")


async def send_in_window(
    prompts: AsyncIterator[P],
    send: Callable[[P], Awaitable[R]],
    *,
    group: asyncio.TaskGroup,
    concurrency: int,
    most_waiting: int,
    weigh: Callable[[R], int] = lambda _: 1,
    ordered: bool = True,
) -> AsyncIterator[R]:
    """Yields the result of ``send`` for each prompt: in the order of the prompts, or with ``ordered=False`` as they
    end. Raises the first error of ``send``.

    The next prompt is taken when fewer than ``concurrency`` prompts are under way, and the results that have ended and
    were not yielded yet weigh less than ``most_waiting`` together. ``weigh`` is 1 for a limit of their number; for a
    limit of their memory it is the size of a result in bytes. When the iterator is closed, the prompts under way are
    cancelled.
    """
    tasks: deque[asyncio.Task[_Ending[R]]] = deque()  # in the order of the prompts, until yielded
    under_way = waiting = 0
    is_exhausted = False
    has_ended = asyncio.Event()

    async def send_and_weigh(prompt: P) -> _Ending[R]:
        try:
            result = await send(prompt)
            return _Ending(result=result, weight=weigh(result))
        except Exception as error:  # raised by a task, it would cancel all other tasks of the group
            return _Ending(error=error)

    def note_end(task: asyncio.Task[_Ending[R]]) -> None:
        nonlocal under_way, waiting, is_exhausted
        under_way -= 1
        if task.cancelled():  # the group ends, and takes no more tasks
            is_exhausted = True
        else:
            waiting += task.result().weight
        has_ended.set()

    try:
        while True:
            while not is_exhausted and under_way < concurrency and waiting < most_waiting:
                try:
                    prompt = await anext(prompts)
                except StopAsyncIteration:
                    is_exhausted = True
                    break
                under_way += 1
                task = group.create_task(send_and_weigh(prompt), name="prompt")
                task.add_done_callback(note_end)
                tasks.append(task)
            has_ended.clear()
            ended_task = _take_ended(tasks, ordered=ordered)
            if ended_task is not None:
                ending = ended_task.result()
                if ending.error is not None:
                    raise ending.error
                waiting -= ending.weight
                yield cast(R, ending.result)
            elif is_exhausted and not tasks:
                return
            else:
                await has_ended.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Ending(Generic[R]):
    """How a prompt ended: with a result, or with an error that the iterator raises."""

    result: R | None = None
    weight: int = 0
    error: Exception | None = None


def _take_ended(tasks: deque[asyncio.Task[R]], *, ordered: bool) -> asyncio.Task[R] | None:
    """Removes the first task of the deque if it has ended, without ``ordered`` any task that has ended, and returns
    it. ``None`` if there is no such task."""
    if ordered:
        return tasks.popleft() if tasks and tasks[0].done() else None
    for task in tasks:
        if task.done():
            tasks.remove(task)
            return task
    return None
