import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.lab.inference.pacing import DecodeClock, Pacer
from tests.lab.virtual_time import run_in_virtual_time

Clock = Callable[[], float]


async def decode(decode_clock: DecodeClock, clock: Clock, start_s: float, tokens: int, rate: float) -> list[float]:
    """Decodes as a stream from ``start_s`` on. Returns when each token was due, and last what the pacer measured."""
    await asyncio.sleep(start_s)
    decode_clock.add_stream()
    pacer = Pacer(tokens, rate, decode_clock)
    times = []
    try:
        while pacer.sent < tokens:
            await pacer.wait_due()
            times.append(clock())
        return [*times, pacer.measure_decoding()]
    finally:
        decode_clock.remove_stream()


def run_streams(share: float, *streams: tuple[float, int, float]) -> list[list[float]]:
    """The result of ``decode`` for each stream (start, tokens, rate)."""

    async def run(clock: Clock) -> list[list[float]]:
        decode_clock = DecodeClock(share, clock=clock)
        return await asyncio.gather(*(decode(decode_clock, clock, *stream) for stream in streams))

    return run_in_virtual_time(run)


def test_a_second_stream_makes_the_tokens_of_the_first_later_while_it_runs() -> None:
    first, second = run_streams(0.5, (0.0, 4, 1.0), (1.5, 1, 1.0))
    # Token 2 is half done at 1.5, and both streams then need 1.5 s for what alone takes 1 s: until 3.0.
    assert first == pytest.approx([1.0, 2.25, 3.5, 4.5, 4.5])
    assert second == pytest.approx([3.0, 1.5])


def test_streams_that_share_nothing_do_not_notice_each_other() -> None:
    first, second = run_streams(0.0, (0.0, 3, 2.0), (0.25, 2, 1.0))
    assert first == pytest.approx([0.5, 1.0, 1.5, 1.5])
    assert second == pytest.approx([1.25, 2.25, 2.0])


def test_a_pause_makes_all_later_tokens_late_by_its_length() -> None:
    async def run(clock: Clock) -> list[float]:
        decode_clock = DecodeClock(clock=clock)
        stream = asyncio.create_task(decode(decode_clock, clock, 0.0, 3, 1.0))
        await asyncio.sleep(1.5)
        decode_clock.pause()
        decode_clock.pause()
        await asyncio.sleep(1.0)
        decode_clock.resume()
        await asyncio.sleep(1.0)
        decode_clock.resume()
        return await stream

    assert run_in_virtual_time(run) == pytest.approx([1.0, 4.0, 5.0, 5.0])


def test_a_stream_that_is_cancelled_leaves_the_others_alone() -> None:
    async def run(clock: Clock) -> list[float]:
        decode_clock = DecodeClock(1.0, clock=clock)
        gone = asyncio.create_task(decode(decode_clock, clock, 0.0, 9, 1.0))
        stays = asyncio.create_task(decode(decode_clock, clock, 0.0, 2, 1.0))
        await asyncio.sleep(1.0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        return await stays

    assert run_in_virtual_time(run) == pytest.approx([1.5, 2.5, 2.5])


@given(
    st.floats(0.0, 1.0),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 9), st.floats(0.5, 20.0)), min_size=1, max_size=6),
)
def test_streams_end_when_a_second_by_second_account_says_so(
    share: float, streams: list[tuple[float, int, float]]
) -> None:
    ended = [times[-2] for times in run_streams(share, *streams)]
    assert ended == pytest.approx(ends_of(share, streams), abs=0.01)


def ends_of(share: float, streams: list[tuple[float, int, float]]) -> list[float]:
    """When each stream ends: from one event to the next, each running stream loses work at the common speed."""
    left = [tokens / rate for _, tokens, rate in streams]
    ends = [0.0] * len(streams)
    now = 0.0
    while any(work > 0 for work in left):
        running = [n for n, (start, _, _) in enumerate(streams) if start <= now and left[n] > 0]
        speed = 1.0 / (1.0 + share * max(0, len(running) - 1))
        next_start = min((start for start, _, _ in streams if start > now), default=float("inf"))
        next_end = min((now + left[n] / speed for n in running), default=float("inf"))
        until = min(next_start, next_end)
        for n in running:
            left[n] -= (until - now) * speed
            if left[n] < 1e-9:
                left[n], ends[n] = 0.0, until
        now = until
    return ends


@given(st.floats(0.0, 1e6), st.floats(0.0, 1.0), st.integers(1, 500), st.floats(1.0, 500.0))
def test_what_a_stream_alone_measures_is_exactly_its_rate_however_late_it_is(
    start: float, late_s: float, tokens: int, rate: float
) -> None:
    now = start
    pacer = Pacer(tokens, rate, DecodeClock(0.5, clock=lambda: now))
    now += tokens / rate + late_s
    assert round(pacer.measure_decoding() * 1e9) == pytest.approx(tokens / rate * 1e9, abs=5)
