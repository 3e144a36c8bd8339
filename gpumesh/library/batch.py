"""Sends many prompts with bounded memory: a few at a time, and only as many ahead as the reader takes results."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeAlias

from gpumesh.daemon.sessions.prompt_sender import send_until_whole
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.library.messages import Messages
from gpumesh.library.reply import Reply
from gpumesh.library.results import BatchResult, Completion

Prompt: TypeAlias = Messages
"""One prompt of ``run_many``: as ``messages`` of ``chat``, or a dictionary with ``messages`` or ``prompt`` and other
arguments of ``chat`` (``model``, ``options``, ``node`` …), which replace those for all prompts."""

RESULTS_AHEAD = 4  # in order: so many times ``concurrency`` prompts are begun before the oldest one has ended


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


async def send_prompt(ask: Callable[[], Reply], index: int, prompt: object) -> BatchResult | Exception:
    """The result of one prompt. Waits while the queue is full, and asks again if the answer was cut. An error that is
    not of this prompt alone is returned too: a task must not raise it."""
    try:
        completion: Completion = await send_until_whole(ask)
    except GPUMeshError as error:
        return BatchResult(index=index, prompt=prompt, error=error)
    except Exception as error:  # a wrong argument, or a bug: the iterator raises it
        return error
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
    slots = asyncio.Semaphore(concurrency)
    tasks: deque[asyncio.Task[BatchResult | Exception]] = deque()  # in the order of the prompts
    most_tasks = concurrency * RESULTS_AHEAD if ordered else concurrency

    async def send(index: int, prompt: object) -> BatchResult | Exception:
        async with slots:
            return await send_prompt(lambda: ask(prompt), index, prompt)

    index = 0
    is_exhausted = False
    try:
        while True:
            while not is_exhausted and len(tasks) < most_tasks:
                try:
                    prompt = await anext(prompts)
                except StopAsyncIteration:
                    is_exhausted = True
                    break
                tasks.append(group.create_task(send(index, prompt), name="prompt"))
                index += 1
            if not tasks:
                return
            if ordered:
                await asyncio.wait([tasks[0]])
                ended = [tasks.popleft()]
            else:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                ended = [task for task in tasks if task in done]
                tasks = deque(task for task in tasks if task not in done)
            for task in ended:
                result = task.result()
                if isinstance(result, Exception):
                    raise result
                yield result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
