"""The two loops of a load generator: a closed loop keeps requests in flight, an open loop sends by the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

SendOne = Callable[[int], Awaitable[None]]
"""Sends the request of this number, and returns when its answer has ended."""


async def send_in_closed_loop(
    send: SendOne, count: int, concurrency: int, *, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Sends ``count`` requests, ``concurrency`` at a time: a worker sends its next request when its last answer has
    ended. As soon as ``is_over``, nothing more is sent."""
    # All workers take their numbers from this one iterator, so each request is sent once.
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            if is_over():
                return
            await send(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(worker())
            # A turn of the event loop for each first request: otherwise the first one would be written to its socket
            # only after all others have been made, and the time of that would count as the server's.
            await asyncio.sleep(0)


async def send_in_open_loop(
    send: SendOne,
    moments_s: Sequence[float],
    until_s: float | None = None,
    *,
    now: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Sends each request at its moment (on the clock ``now``), whether or not earlier answers have come.

    Nothing is sent whose moment is ``until_s`` or later.
    """
    schedule = sorted((moment_s, number) for number, moment_s in enumerate(moments_s))
    async with asyncio.TaskGroup() as group:
        for moment_s, number in schedule:
            if until_s is not None and moment_s >= until_s:
                break
            wait_s = moment_s - now()
            if wait_s > 0:
                await sleep(wait_s)
            group.create_task(_as_coroutine(send, number))


async def _as_coroutine(send: SendOne, number: int) -> None:
    """Awaits ``send``: a task is made of a coroutine only."""
    await send(number)
