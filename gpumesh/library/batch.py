"""Sends many prompts with bounded memory: a few at a time, and only as many ahead as the reader takes results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeAlias

from gpumesh.daemon.sessions.prompt_sender import send_until_whole
from gpumesh.daemon.sessions.prompt_window import send_in_window
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.library.messages import Messages
from gpumesh.library.reply import Reply
from gpumesh.library.results import BatchResult, Completion

Prompt: TypeAlias = Messages
"""One prompt of ``run_many``: as ``messages`` of ``chat``, or a dictionary with ``messages`` or ``prompt`` and other
arguments of ``chat`` (``model``, ``options``, ``node`` …), which replace those for all prompts."""

RESULTS_WAITING = 3  # in order: at so many times ``concurrency`` results behind the oldest prompt, no more are begun


async def iterate(prompts: object) -> AsyncIterator[Any]:
    """The prompts of a list, a generator or an async generator."""
    if isinstance(prompts, AsyncIterable):
        async with closing_iterator(aiter(prompts)) as items:
            async for prompt in items:
                yield prompt
        return
    assert isinstance(prompts, Iterable), "require_prompts has checked it"
    for prompt in prompts:
        yield prompt


def require_prompts(prompts: object, concurrency: object) -> None:
    """Raises TypeError for what is no series of prompts or no number, and ValueError for a number below 1."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable | AsyncIterable):
        raise TypeError(f"prompts are a list or another iterable of prompts, not {type(prompts).__name__}")
    if concurrency is None:
        return
    if isinstance(concurrency, bool) or not isinstance(concurrency, int):
        raise TypeError(f"concurrency is a number of prompts, not {type(concurrency).__name__}")
    if concurrency < 1:
        raise ValueError(f"concurrency is at least 1, not {concurrency}")


def read_prompt(prompt: object, common: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``chat`` for one prompt. ``common`` are those for all prompts."""
    if not isinstance(prompt, Mapping) or "role" in prompt:
        return {**common, "messages": prompt}
    own = dict(prompt)
    if ("prompt" in own) == ("messages" in own):
        raise ValueError('a prompt that is a dictionary has either "prompt" or "messages"')
    if "prompt" in own:
        own["messages"] = own.pop("prompt")
    unknown = set(own) - set(common) - {"messages"}
    if unknown:
        raise ValueError(f"a prompt has the key {min(unknown)!r}; the keys are prompt, messages, {', '.join(common)}")
    return {**common, **own}


async def send_prompt(ask: Callable[[], Reply], index: int, prompt: object) -> BatchResult:
    """The result of one prompt. Waits while the queue is full, and asks again if the answer was cut. Raises errors
    that are not of the mesh, such as TypeError for a wrong argument."""
    try:
        completion: Completion = await send_until_whole(ask)
    except GPUMeshError as error:
        return BatchResult(index=index, prompt=prompt, error=error)
    return BatchResult(index=index, prompt=prompt, completion=completion)


async def run_prompts(
    prompts: AsyncIterator[Any],
    ask: Callable[[object], Reply],
    *,
    group: asyncio.TaskGroup,
    concurrency: int,
    ordered: bool,
) -> AsyncIterator[BatchResult]:
    """Yields a result for each prompt, in the order of the prompts or as they end. ``ask`` makes the request for a
    prompt, and may raise TypeError and ValueError. When the iterator is closed, the prompts under way are cancelled."""

    async def send(numbered_prompt: tuple[int, object]) -> BatchResult:
        index, prompt = numbered_prompt
        return await send_prompt(lambda: ask(prompt), index, prompt)

    async with closing_iterator(_enumerate(prompts)) as numbered_prompts:
        results = send_in_window(
            numbered_prompts,
            send,
            group=group,
            concurrency=concurrency,
            # Without an order, a result waits only for its reader. Then no more prompts are begun.
            most_waiting=concurrency * RESULTS_WAITING if ordered else 1,
            ordered=ordered,
        )
        async with closing_iterator(results) as closing:
            async for result in closing:
                yield result


async def _enumerate(prompts: AsyncIterator[object]) -> AsyncIterator[tuple[int, object]]:
    """The prompts with their numbers. The caller of ``run_prompts`` closes ``prompts``."""
    index = 0
    async for prompt in prompts:
        yield index, prompt
        index += 1
