"""Watches a running pool by the counters of its llama-server: how fast it answers, and whether it still computes.

llama-server does not notice a worker that has stopped without the end of its connection: it waits for it without a
limit, and its ``/health`` says that all is well (docs/internals/pools.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from gpumesh.backends.prometheus_text import PAGE_BYTES, read_samples
from gpumesh.errors import PoolFailed, ProbeError
from gpumesh.pools.running.progress import MeasuredSpeed
from gpumesh.probes.bounded_get import get_bounded
from gpumesh.probes.http_client import make_http_client

INTERVAL_S = 5.0
STALLED_S = 180.0  # a long prompt on a slow CPU may be one step of a minute
# Counters of llama.cpp (tools/server, build 10434): the tokens that it has written, the time for them, summed over all
# streams, and the steps that it has computed.
TOKENS = "llamacpp:tokens_predicted_total"
SECONDS = "llamacpp:tokens_predicted_seconds_total"
STEPS = "llamacpp:n_decode_total"
# The tokens that the draft model has proposed, and those of them that were taken over. Older builds do not count them.
PROPOSED = "llamacpp:spec_decode_num_draft_tokens_total"
ACCEPTED = "llamacpp:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """``tokens_per_s``: the mean of one stream over all answers so far. ``acceptance``: the share of the draft model's
    tokens that were taken over. ``None``: unknown."""

    tokens_per_s: float | None = None
    steps: float | None = None
    acceptance: float | None = None


class StallWatch:
    """Notices that a server has requests and computes nothing."""

    def __init__(self) -> None:
        self._steps: float | None = None
        self._since: float | None = None  # since when it has had requests, and computed nothing

    def is_stalled(self, steps: float | None, *, is_busy: bool, now: float) -> bool:
        """``steps``: how many steps the server has computed; ``None`` if it does not answer. ``now`` is monotonic
        seconds."""
        has_computed = steps is not None and steps != self._steps
        if has_computed:
            self._steps = steps
        if has_computed or not is_busy:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since >= STALLED_S


async def watch_speed(
    url: str,
    *,
    acceptance: Callable[[], float | None],
    is_busy: Callable[[], bool],
    report: Callable[[MeasuredSpeed], None],
    clock: Callable[[], float],
) -> None:
    """Reports the speed every ``INTERVAL_S`` seconds, until cancelled. Raises PoolFailed when llama-server has requests
    and computes nothing.

    ``url`` is llama-server's. ``acceptance`` returns that share by llama-server's log, for a build that does not
    count it (``None``: unknown), ``is_busy`` whether the pool has requests, ``clock`` monotonic seconds."""
    stall = StallWatch()
    async with make_http_client() as client:
        while True:
            counters = await _read_counters(client, url)
            accepted = acceptance() if counters.acceptance is None else counters.acceptance
            report(MeasuredSpeed(counters.tokens_per_s, accepted))
            if stall.is_stalled(counters.steps, is_busy=is_busy(), now=clock()):
                raise PoolFailed(
                    f"llama-server has requests, and has computed nothing for {STALLED_S:g} s",
                    hint="a worker has stopped, or the way to it: all parts are started again",
                )
            await asyncio.sleep(INTERVAL_S)


async def _read_counters(client: httpx.AsyncClient, url: str) -> ServerCounters:
    try:
        status, page = await get_bounded(client, f"{url}/metrics", {}, {})
    except ProbeError:  # the mesh's own probe reports a server that does not answer
        return ServerCounters()
    return parse_counters(page) if status == 200 else ServerCounters()


def parse_counters(page: bytes) -> ServerCounters:
    page = page[:PAGE_BYTES]
    steps = read_samples(page, STEPS)
    return ServerCounters(
        tokens_per_s=_divide(read_samples(page, TOKENS), read_samples(page, SECONDS)),
        steps=steps[0] if steps else None,
        acceptance=_divide(read_samples(page, ACCEPTED), read_samples(page, PROPOSED)),
    )


def _divide(samples: tuple[float, ...], by: tuple[float, ...]) -> float | None:
    return samples[0] / by[0] if samples and by and by[0] > 0 else None
