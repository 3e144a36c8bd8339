"""Measures the speed of a running pool: by the counters of its llama-server, and by what its log says of drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx

from gpumesh.backends.prometheus_text import PAGE_BYTES, read_samples
from gpumesh.errors import ProbeError
from gpumesh.pools.running.progress import MeasuredSpeed
from gpumesh.probes.bounded_get import get_bounded
from gpumesh.probes.http_client import make_http_client

INTERVAL_S = 5.0
# Counters of llama.cpp (tools/server/server.cpp, build 10434): the tokens that it has written, and the time for them,
# summed over all streams.
TOKENS = "llamacpp:tokens_predicted_total"
SECONDS = "llamacpp:tokens_predicted_seconds_total"


async def follow_speed(
    url: str, acceptance: Callable[[], float | None], report: Callable[[MeasuredSpeed], None]
) -> None:
    """Reports the speed every ``INTERVAL_S`` seconds, until cancelled. ``url`` is llama-server's. ``acceptance``
    returns the share of a draft model's tokens that were taken over; ``None``: there were none."""
    async with make_http_client() as client:
        while True:
            report(MeasuredSpeed(await _read_tokens_per_s(client, url), acceptance()))
            await asyncio.sleep(INTERVAL_S)


async def _read_tokens_per_s(client: httpx.AsyncClient, url: str) -> float | None:
    """The mean of the tokens per second of one stream, over all answers so far."""
    try:
        status, page = await get_bounded(client, f"{url}/metrics", {}, {})
    except ProbeError:  # the mesh's own probe reports a server that does not answer
        return None
    return parse_tokens_per_s(page) if status == 200 else None


def parse_tokens_per_s(page: bytes) -> float | None:
    tokens, seconds = read_samples(page[:PAGE_BYTES], TOKENS), read_samples(page[:PAGE_BYTES], SECONDS)
    return tokens[0] / seconds[0] if tokens and seconds and seconds[0] > 0 else None
