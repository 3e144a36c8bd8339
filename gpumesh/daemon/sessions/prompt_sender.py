"""Sends a prompt through a Session and measures its answer (TTFT, tokens/s); retries a prompt of a batch.

`run` and the other commands with prompts use this file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from gpumesh.batches.measured_answer import milliseconds_between, read_measured_answer
from gpumesh.batches.retries import judge_error
from gpumesh.daemon.sessions.session import PromptRequest, Session
from gpumesh.errors import GPUMeshError, QueueFull, StreamCut, UsageError

T = TypeVar("T")

PROMPTS_PER_NODE = 8  # concurrent prompts for each node: enough for a node that runs several prompts at a time
MAX_CONCURRENT_PROMPTS = 256  # of all nodes, so that a large batch does not flood the mesh's queue


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The result of one prompt: ``response``, or ``error``. ``index`` is the prompt's number in its batch.

    ``ttft_ms`` and ``total_ms`` are measured here, queueing and tunnel included; ``tokens`` and ``tokens_per_s`` are
    the server's own figures.
    """

    index: int
    prompt: str
    response: str | None
    node: str | None = None
    attempts: int = 0
    ttft_ms: float | None = None
    total_ms: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    error: str | None = None


async def send_prompt(
    session: Session, prompt: PromptRequest, index: int, text: str, *, on_text: Callable[[str], None] | None = None
) -> PromptResult:
    """Sends one prompt, reads its answer to the end, and returns the result. Raises GPUMeshError.

    Cancelling this function stops the generation. ``index`` and ``text`` are the prompt's number and text in the
    result. ``on_text`` gets each piece of the answer as it comes.
    """
    began = time.perf_counter()
    async with session.chat(prompt) as stream:
        answer = await read_measured_answer(stream, began=began, clock=time.perf_counter, on_text=on_text)
        node, attempts = stream.node, stream.attempts
    return PromptResult(
        index=index,
        prompt=text,
        response=answer.text,
        node=node,
        attempts=attempts,
        ttft_ms=answer.ttft_ms,
        total_ms=answer.total_ms,
        tokens=answer.tokens,
        tokens_per_s=answer.tokens_per_s,
    )


def default_concurrency(node_count: int) -> int:
    """How many prompts of a batch to send at a time: enough for all nodes, but not enough to flood the mesh's queue."""
    return min(max(node_count, 1) * PROMPTS_PER_NODE, MAX_CONCURRENT_PROMPTS)


async def send_with_retries(session: Session, prompt: PromptRequest, index: int, text: str) -> PromptResult:
    """Sends one prompt of a batch and returns its result. If the prompt fails, the result holds the error.

    Sends as ``send_until_whole`` does. Raises UsageError only. Each cut answer counts as one attempt in the result.
    """
    began = time.perf_counter()
    cut_answers = 0

    def count_cut() -> None:
        nonlocal cut_answers
        cut_answers += 1

    try:
        result = await send_until_whole(lambda: send_prompt(session, prompt, index, text), count_cut)
    except UsageError:
        raise  # every other prompt would get the same error, so it is reported once for all prompts
    except GPUMeshError as error:
        return _failed_result(index, text, began, cut_answers, error)
    return replace(result, attempts=result.attempts + cut_answers, total_ms=_milliseconds_since(began))


async def send_until_whole(send: Callable[[], Awaitable[T]], on_cut: Callable[[], None] = lambda: None) -> T:
    """The answer to a prompt of a batch, of which no part is shown before the whole has come.

    Waits while the queue is full, and sends the prompt again when its answer was cut; ``on_cut`` is called each time.
    A person waits for it, so that all other errors are not waited for. Raises StreamCut after ``MAX_TRIES`` cut
    answers, and the other errors of ``send``.
    """
    cut_answers = 0
    while True:
        try:
            return await send()
        except (QueueFull, StreamCut) as error:
            again = judge_error(error, cut_answers)
            if isinstance(error, StreamCut):
                cut_answers += 1
                on_cut()
            if again is None:
                raise
            await asyncio.sleep(again.delay_s)


def _failed_result(index: int, text: str, began: float, attempts: int, error: GPUMeshError) -> PromptResult:
    return PromptResult(
        index, text, None, error.node, attempts, total_ms=_milliseconds_since(began), error=error.message
    )


def _milliseconds_since(began: float) -> float:
    return milliseconds_between(began, time.perf_counter())
