from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.rates.activity import SHARE_AGE_S, SHARE_WINDOW_S, ActivityMeter


def test_the_mean_number_of_streams_is_weighted_by_time() -> None:
    meter = ActivityMeter()
    stream_sum, _ = meter.begin_stream(10.0)
    assert meter.mean_streams(10.0, stream_sum, 10.0) == 1.0, "no time has passed"
    meter.begin_stream(11.0)
    meter.begin_stream(12.0)
    assert meter.mean_streams(10.0, stream_sum, 13.0) == pytest.approx((1 + 2 + 3) / 3)
    meter.end_stream(13.0)
    meter.end_stream(13.0)
    assert meter.mean_streams(10.0, stream_sum, 16.0) == pytest.approx((1 + 2 + 3 + 3) / 6)
    assert repr(meter) == "<ActivityMeter 1 streams, 0 prompts>"


def test_reading_is_measured_by_prompts_and_by_time() -> None:
    meter = ActivityMeter()
    read_sum = meter.begin_read(10.0)
    meter.begin_read(11.0)
    assert meter.mean_reads(10.0, read_sum, 12.0) == pytest.approx(1.5)
    meter.end_read(12.0)
    _, busy_sum = meter.begin_stream(12.0)
    meter.end_read(13.0)
    assert meter.busy_share(12.0, busy_sum, 16.0) == pytest.approx(0.25)
    assert meter.busy_share(16.0, busy_sum, 16.0) == 0.0, "no time has passed"


def test_a_clock_that_goes_back_does_no_harm() -> None:
    meter = ActivityMeter()
    stream_sum, busy_sum = meter.begin_stream(10.0)
    meter.begin_stream(9.0)
    assert meter.mean_streams(10.0, stream_sum, 11.0) == 2.0
    assert meter.mean_streams(10.0, stream_sum, 9.0) == 2.0
    assert meter.busy_share(10.0, busy_sum, 9.0) == 0.0


def test_the_read_share_follows_what_was_read_lately() -> None:
    meter = ActivityMeter()
    assert meter.read_share(1000.0) == 0.0
    meter.begin_read(1000.0)
    assert meter.read_share(1000.0 + SHARE_AGE_S / 2) == 0.0, "it may be so old"
    assert meter.read_share(1000.0 + SHARE_WINDOW_S) == pytest.approx(1 - math.exp(-1))
    meter.end_read(1000.0 + SHARE_WINDOW_S)
    assert meter.read_share(1000.0 + 2 * SHARE_WINDOW_S) == pytest.approx((1 - math.exp(-1)) * math.exp(-1))


@given(st.lists(st.tuples(st.floats(0.0, 50.0), st.booleans()), max_size=40))
def test_the_read_share_is_the_exponential_mean_of_the_busy_time(steps: list[tuple[float, bool]]) -> None:
    meter, now, expected, busy = ActivityMeter(), 100.0, 0.0, False
    meter.read_share(now)
    for seconds, starts in steps:
        now += seconds + 2 * SHARE_AGE_S
        kept = math.exp(-(seconds + 2 * SHARE_AGE_S) / SHARE_WINDOW_S)
        expected = expected * kept + (1.0 - kept if busy else 0.0)
        assert meter.read_share(now) == pytest.approx(expected, abs=1e-9)
        if starts and not busy:
            meter.begin_read(now)
        elif busy and not starts:
            meter.end_read(now)
        busy = starts


def test_each_moment_of_the_gpus_is_shared_by_the_requests_that_are_there() -> None:
    meter = ActivityMeter()
    meter.begin_read(10.0)  # alone: a read counts as a stream does
    first_s, first_j = meter.gpu_s, meter.energy_j
    meter.note_gpus(12.0, 2, 600.0)  # until then nothing was known: one GPU, no power
    meter.begin_stream(14.0)
    second_s, second_j = meter.gpu_s, meter.energy_j
    meter.end_read(20.0)
    assert (meter.gpu_s - first_s, meter.energy_j - first_j) == pytest.approx((2 + 2 * 2 + 2 * 3, 2 * 600 + 3 * 600))
    meter.end_stream(21.0)
    assert (meter.gpu_s - second_s, meter.energy_j - second_j) == pytest.approx((2 * 3 + 2, 3 * 600 + 600))
    assert (2 + 2 * 2 + 2 * 3) + (2 * 3 + 2) == 2 + 2 * 9, "both shares together are the time of the GPUs"
    idle_s, idle_j = meter.gpu_s, meter.energy_j
    meter.note_gpus(30.0, 0, 60.0)
    meter.begin_stream(40.0)
    assert (meter.gpu_s, meter.energy_j) == (idle_s, idle_j), "an idle GPU is nobody's"
