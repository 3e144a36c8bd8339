"""Reads the answer to a prompt to its end, and measures it: for `gpumesh run`, and for the prompts of batches."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass

from gpumesh.backends.base import Chunk, ServerCounters


@dataclass(frozen=True, slots=True)
class MeasuredAnswer:
    """A whole answer. ``ttft_ms`` and ``total_ms`` are measured here, queueing and tunnel included, ``ttft_ms`` to the
    first text or thought; ``tokens`` and ``tokens_per_s`` are the server's own figures. ``None``: not known."""

    text: str
    ttft_ms: float | None
    total_ms: float
    tokens: int | None
    tokens_per_s: float | None


async def read_measured_answer(
    chunks: AsyncIterable[Chunk],
    *,
    began: float,
    clock: Callable[[], float],
    on_text: Callable[[str], None] | None = None,
) -> MeasuredAnswer:
    """Reads ``chunks`` to their end; ``on_text`` gets each piece of the text as it comes. The request was sent at the
    time ``began`` of ``clock``, in seconds."""
    ttft_ms: float | None = None
    pieces: list[str] = []
    counters: ServerCounters | None = None
    async for chunk in chunks:
        has_token = bool(chunk.text or chunk.thinking)  # the final chunk, for example, has none
        if has_token and ttft_ms is None:
            ttft_ms = milliseconds_between(began, clock())
        if chunk.text:
            pieces.append(chunk.text)
            if on_text is not None:
                on_text(chunk.text)
        counters = chunk.counters or counters  # the last chunk with counters has the final ones
    rate = None if counters is None else counters.tokens_per_s
    return MeasuredAnswer(
        "".join(pieces),
        ttft_ms,
        milliseconds_between(began, clock()),
        None if counters is None else counters.tokens,
        None if rate is None else round(rate, 2),
    )


def milliseconds_between(began: float, ended: float) -> float:
    """The time between two moments, given in seconds, in milliseconds with one decimal."""
    return round((ended - began) * 1000.0, 1)
