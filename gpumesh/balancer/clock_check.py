"""Compares a server's durations with our own clock. Pure.

A server whose clock is wrong, or that lies, could say that it is a hundred times as fast as it is. Then it would get
all requests. But it cannot hide how long an answer took, because we have waited for it.
"""

from __future__ import annotations

from msgspec.structs import replace

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import PlacedRequest

# A server's total may be longer than our wait by this factor and by some seconds more: clocks differ a bit.
LONGER_FACTOR, LONGER_S = 1.1, 0.1
# Our wait may be longer than the server's total by this factor and by some seconds more: the network takes time too.
SHORTER_FACTOR, SHORTER_S = 1.5, 0.5
# The text may have arrived over a longer time than the server has generated it, by this factor and by some seconds
# more: the last token may have taken longer through the network than the first.
STREAM_FACTOR, STREAM_S = 1.25, 0.1
PAUSED_FACTOR = 3.0  # the same without a total: the server may have paused the answer without counting the pause

LEAST_MS = 1e-6  # a shorter total (1 ns) is no figure, and nothing can be scaled by it


def correct_durations(counters: ServerCounters, placed: PlacedRequest, now: float) -> ServerCounters:
    """The counters of a whole answer that has ended ``now`` (of the caller's clock), with durations that agree with our
    clock: first their total, then the time of the generation."""
    return _correct_generation(_correct_total(counters, placed, now), placed, now)


def _correct_total(counters: ServerCounters, placed: PlacedRequest, now: float) -> ServerCounters:
    """If the server's durations cannot be true, scales all of them, so that their total is the time for which we have
    waited for the server (without the network).

    If the client was slow, our time includes the wait for the client. Then only durations that are too long are
    corrected. The same is true if the server gives parts without a total, because the request may have waited inside
    the server."""
    waited_ms = max(now - placed.sent_at - placed.account.rtt_s, 0.0) * 1000.0
    total_ms = counters.total_ms
    has_total = total_ms is not None
    if total_ms is None:
        total_ms = (counters.load_ms or 0.0) + (counters.prompt_ms or 0.0) + (counters.eval_ms or 0.0)
    if not total_ms >= LEAST_MS:  # true for NaN
        return counters
    is_too_long = total_ms > waited_ms * LONGER_FACTOR + LONGER_S * 1000.0
    may_be_too_short = has_total and not placed.had_slow_client
    if not is_too_long and not (may_be_too_short and waited_ms > total_ms * SHORTER_FACTOR + SHORTER_S * 1000.0):
        return counters
    factor = waited_ms / total_ms
    return replace(
        counters,
        total_ms=_scale(counters.total_ms, factor),
        load_ms=_scale(counters.load_ms, factor),
        prompt_ms=_scale(counters.prompt_ms, factor),
        eval_ms=_scale(counters.eval_ms, factor),
    )


def _correct_generation(counters: ServerCounters, placed: PlacedRequest, now: float) -> ServerCounters:
    """If the text arrived over a much longer time than the server's time of generation, replaces the time of generation
    by the time of the text. The time of reading the prompt is then at most the rest of the total.

    A time of generation that is longer than the time of the text is not corrected: a proxy may have collected the
    text."""
    eval_ms = counters.eval_ms
    if eval_ms is None or placed.first_token_at is None or placed.had_slow_client:
        return counters
    stream_ms = (now - placed.first_token_at) * 1000.0
    factor = PAUSED_FACTOR if counters.total_ms is None else STREAM_FACTOR
    if not stream_ms > eval_ms * factor + STREAM_S * 1000.0:
        return counters
    prompt_ms = counters.prompt_ms
    if prompt_ms is not None and counters.total_ms is not None:
        prompt_ms = min(prompt_ms, max(counters.total_ms - (counters.load_ms or 0.0) - stream_ms, 0.0))
    return replace(counters, prompt_ms=prompt_ms, eval_ms=stream_ms)


def _scale(milliseconds: float | None, factor: float) -> float | None:
    return None if milliseconds is None else milliseconds * factor
