"""A page of metrics as servers write it, and as no server should."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.prometheus_text import MAX_SERIES, PAGE_BYTES, read_request_count, read_samples, read_share_pct

PAGE = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b \\" c"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4
vllm:num_requests_running_total{engine="1"} 900
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5 1767225600000
llamacpp:requests_deferred 2
"""


def test_the_series_of_a_metric_are_added_up() -> None:
    assert read_request_count(PAGE, "vllm:num_requests_running") == 7
    assert read_request_count(PAGE, "llamacpp:requests_deferred") == 2
    assert read_share_pct(PAGE, "vllm:kv_cache_usage_perc") == 50


def test_the_first_name_that_is_there_counts() -> None:
    page = b"vllm:gpu_cache_usage_perc 0.75\n"
    assert read_share_pct(page, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc") == 75
    assert read_share_pct(page, "vllm:kv_cache_usage_perc") is None


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-1", b"x", b"1e400", b"0x10", b"9" * 41, b""])
def test_what_is_no_figure_is_unknown(value: bytes) -> None:
    assert read_request_count(b"m:x " + value + b"\n", "m:x") is None
    assert read_share_pct(b"m:x " + value + b"\n", "m:x") is None


def test_a_figure_that_no_server_reaches_is_unknown() -> None:
    assert read_request_count(b"m:x 1e11\n", "m:x") is None
    assert read_share_pct(b"m:x 1.5\n", "m:x") is None


def test_a_page_is_read_within_bounds() -> None:
    assert len(read_samples(b"m:x 1\n" * 10_000, "m:x")) == MAX_SERIES
    assert read_samples(b"#" * PAGE_BYTES + b"\nm:x 1\n", "m:x") == ()
    began = time.process_time()
    for page in (
        b"m:x{" * 400_000,
        b"m:x{" + b"a" * 2_000_000,
        b"m:x{}" * 400_000,
        (b"m:x{" + b"}" * 1990 + b"\n") * 600,
    ):
        assert read_samples(page, "m:x") == ()
    assert time.process_time() - began < 2.0


@given(st.binary(max_size=300))
def test_no_page_is_an_error(page: bytes) -> None:
    count = read_request_count(page + b"\nm:x " + page, "m:x")
    assert count is None or count >= 0
