"""The two loops of a load generator: a closed loop keeps requests in flight, an open loop sends by the clock.

Both loops send conversations. The requests of one conversation are sent one after another: the next one when the answer
before it has ended. Most conversations have a single request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

SendOne = Callable[[int], Awaitable[None]]
"""Sends the request of this number, and returns when its answer has ended."""

Conversation = Sequence[int]
"""The numbers of the requests that belong together, in the order of their turns."""


def split_conversations(ids: Sequence[int | None]) -> list[Conversation]:
    """Groups requests by the ids of their conversations, in the order of the first request of each. Pure.

    ``ids`` has the id for each request. A request without an id (``None``) is a conversation of its own.
    """
    conversations: list[list[int]] = []
    by_id: dict[int, list[int]] = {}
    for number, conversation_id in enumerate(ids):
        known = None if conversation_id is None else by_id.get(conversation_id)
        if known is not None:
            known.append(number)
            continue
        numbers = [number]
        conversations.append(numbers)
        if conversation_id is not None:
            by_id[conversation_id] = numbers
    return list(conversations)


async def send_all(
    send: SendOne,
    conversation_ids: Sequence[int | None],
    moments_s: Sequence[float | None],
    concurrency: int | None,
    *,
    until_s: float | None,
    now: Callable[[], float],
    think_s: float = 0.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Sends the requests of a stage: in a closed loop, or in an open loop if ``concurrency`` is ``None``.

    ``conversation_ids`` and ``moments_s`` have the conversation and the moment of each request; in an open loop, a
    request without a moment is due at once. Nothing is sent at ``until_s`` or later, on the clock ``now``.
    """
    conversations = split_conversations(conversation_ids)

    def is_over() -> bool:
        return until_s is not None and now() >= until_s

    if concurrency is None:
        moments = [moment_s or 0.0 for moment_s in moments_s]
        await send_in_open_loop(send, conversations, moments, until_s, now=now, think_s=think_s, sleep=sleep)
    else:
        await send_in_closed_loop(send, conversations, concurrency, think_s=think_s, is_over=is_over, sleep=sleep)


async def send_in_closed_loop(
    send: SendOne,
    conversations: Sequence[Conversation],
    concurrency: int,
    *,
    think_s: float = 0.0,
    is_over: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Sends all requests, ``concurrency`` conversations at a time: a worker begins its next conversation when its last
    one has ended. ``think_s`` passes between an answer and the next turn. As soon as ``is_over``, nothing more is
    sent."""
    # All workers take their conversations from this one iterator, so each request is sent once.
    unsent = iter(conversations)

    async def worker() -> None:
        for conversation in unsent:
            await _send_turns(send, conversation, think_s, is_over, sleep)
            if is_over():
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(conversations))):
            group.create_task(worker())
            # A turn of the event loop for each first request: otherwise the first one would be written to its socket
            # only after all others have been made, and the time of that would count as the server's.
            await asyncio.sleep(0)


async def send_in_open_loop(
    send: SendOne,
    conversations: Sequence[Conversation],
    moments_s: Sequence[float],
    until_s: float | None = None,
    *,
    now: Callable[[], float],
    think_s: float = 0.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Begins each conversation at the moment of its first request (on the clock ``now``), whether or not earlier
    answers have come. ``think_s`` passes between an answer and the next turn.

    ``moments_s`` has a moment for each request. Nothing is sent at ``until_s`` or later.
    """

    def is_over() -> bool:
        return until_s is not None and now() >= until_s

    schedule = sorted(conversations, key=lambda conversation: moments_s[conversation[0]])
    async with asyncio.TaskGroup() as group:
        for conversation in schedule:
            moment_s = moments_s[conversation[0]]
            if until_s is not None and moment_s >= until_s:
                break
            while (wait_s := moment_s - now()) > 0:  # a timer may be early: uvloop rounds its time to milliseconds
                await sleep(wait_s)
            group.create_task(_send_turns(send, conversation, think_s, is_over, sleep, first_is_due=True))


async def _send_turns(
    send: SendOne,
    conversation: Conversation,
    think_s: float,
    is_over: Callable[[], bool],
    sleep: Callable[[float], Awaitable[None]],
    *,
    first_is_due: bool = False,
) -> None:
    """Sends the requests of a conversation, one after another. ``first_is_due``: the first one is sent in any case."""
    for turn, number in enumerate(conversation):
        if turn and think_s > 0:
            await sleep(think_s)
        if is_over() and not (first_is_due and turn == 0):
            return
        await send(number)
