from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.prefixes.cache_size import (
    CONTEXTS_PER_SLOT,
    DEFAULT_SLOTS,
    HITS_TO_GROW,
    LEAST_BYTES,
    MAX_BYTES,
    MAX_SEQUENCES,
    SEQUENCES_PER_SLOT,
    UNEXPECTED_HITS_TO_GROW,
    CacheSize,
    count_read_tokens,
)

CONTEXT = 32768
STATED_BYTES = 4 * CONTEXTS_PER_SLOT * CONTEXT * 4
STATED = 4 * SEQUENCES_PER_SLOT  # the sequences of a server with four slots


def make_size(slots: int | None = 4) -> CacheSize:
    size = CacheSize()
    size.set_server_size(slots, CONTEXT, 4.0)
    return size


def hit(size: CacheSize, believed_bytes: int = 30_000) -> None:
    size.learn(prompt_bytes=40_000, believed_bytes=believed_bytes, prompt_tokens=10_000, read_tokens=2500)


def miss(size: CacheSize) -> None:
    size.learn(prompt_bytes=40_000, believed_bytes=30_000, prompt_tokens=10_000, read_tokens=10_000)


def test_a_cache_has_some_sequences_for_each_slot() -> None:
    assert (make_size().sequences, make_size().max_bytes) == (STATED, STATED_BYTES)
    size = make_size(1)
    size.set_server_size(None, None, 4.0)
    assert (size.sequences, size.max_bytes) == (DEFAULT_SLOTS * SEQUENCES_PER_SLOT, LEAST_BYTES)


@pytest.mark.parametrize("bytes_per_token", [0.0, -1.0, math.nan, math.inf])
def test_impossible_bytes_per_token_change_nothing(bytes_per_token: float) -> None:
    size = make_size()
    size.set_server_size(4, 100, bytes_per_token)
    assert size.max_bytes == STATED_BYTES


@given(slots=st.none() | st.integers(), context=st.none() | st.integers(), per_token=st.floats())
def test_a_stated_size_is_bounded(slots: int | None, context: int | None, per_token: float) -> None:
    size = CacheSize()
    size.set_server_size(slots, context, per_token)
    assert 1 <= size.sequences <= MAX_SEQUENCES
    assert 0 <= size.max_bytes <= MAX_BYTES


def test_three_misses_in_a_row_halve_the_belief_and_hits_give_it_back_slowly() -> None:
    size = make_size()
    for _ in range(2):
        miss(size)
    assert size.sequences == STATED
    miss(size)
    assert size.sequences == STATED // 2
    for _ in range(HITS_TO_GROW - 1):
        hit(size)
    assert size.sequences == STATED // 2
    hit(size)
    assert size.sequences == STATED // 2 + 1
    for _ in range(STATED * HITS_TO_GROW):
        hit(size)
    assert size.sequences == STATED  # never more than was believed at first


def test_a_server_that_misses_with_few_sequences_is_not_believed_to_keep_more_of_them() -> None:
    size = make_size()
    for _ in range(3):
        size.learn(
            prompt_bytes=40_000, believed_bytes=30_000, prompt_tokens=10_000, read_tokens=10_000, held_sequences=10
        )
    assert size.sequences == 5


def test_a_few_misses_among_hits_prove_nothing() -> None:
    size = make_size()
    for _ in range(100):
        miss(size)
        for _ in range(3):
            hit(size)
    assert size.sequences == STATED


def test_a_server_that_misses_every_second_time_keeps_fewer() -> None:
    size = make_size()
    for _ in range(20):
        miss(size)
        hit(size)
    assert size.sequences < STATED


def test_a_server_without_a_cache_is_believed_to_have_nothing_until_it_shows_one() -> None:
    size = make_size()
    for _ in range(3 * STATED.bit_length()):
        miss(size)
    assert size.sequences == 0
    for _ in range(UNEXPECTED_HITS_TO_GROW):
        hit(size, believed_bytes=0)
    assert size.sequences == 1


def test_a_server_that_has_more_than_believed_keeps_more() -> None:
    size = make_size()
    for _ in range(UNEXPECTED_HITS_TO_GROW):
        assert size.sequences == STATED
        hit(size, believed_bytes=2000)  # only the system prompt was believed to be there
    assert (size.sequences, size.max_bytes) == (STATED * 3 // 2, STATED_BYTES * 3 // 2)
    for _ in range(2 * HITS_TO_GROW):
        hit(size)
    assert size.sequences == STATED * 3 // 2  # hits alone do not prove more
    for _ in range(100 * UNEXPECTED_HITS_TO_GROW):
        hit(size, believed_bytes=0)
    assert size.sequences == MAX_SEQUENCES


def test_the_answer_of_the_last_turn_is_no_surprise() -> None:
    size = make_size()
    for _ in range(100):
        hit(size, believed_bytes=20_000)
    assert size.sequences == STATED


def test_what_was_learned_grows_and_shrinks_with_the_slots() -> None:
    size = make_size()
    for _ in range(3):
        miss(size)
    size.set_server_size(4, 4096, 4.0)
    assert size.sequences == STATED // 2
    size.set_server_size(8, 4096, 4.0)
    assert size.sequences == STATED


def test_a_short_belief_and_a_half_hit_prove_nothing() -> None:
    size = make_size()
    for _ in range(20):
        size.learn(prompt_bytes=2000, believed_bytes=1024, prompt_tokens=500, read_tokens=500)
        size.learn(prompt_bytes=40_000, believed_bytes=30_000, prompt_tokens=10_000, read_tokens=5500)
    assert repr(size) == f"<CacheSize {STATED} of {STATED} sequences, {STATED_BYTES} bytes>"


@given(st.lists(st.tuples(st.integers(0), st.integers(0), st.floats(), st.floats()), max_size=60))
def test_no_figures_break_the_bounds(figures: list[tuple[int, int, float, float]]) -> None:
    size = make_size()
    for prompt_bytes, believed_bytes, prompt_tokens, read_tokens in figures:
        size.learn(
            prompt_bytes=prompt_bytes % 2**40,
            believed_bytes=believed_bytes % 2**40,
            prompt_tokens=prompt_tokens,
            read_tokens=read_tokens,
        )
    assert 0 <= size.sequences <= MAX_SEQUENCES


@pytest.mark.parametrize(
    ("counters", "rate", "read_tokens"),
    [
        (ServerCounters(), 1000.0, None),
        (ServerCounters(prompt_tokens=100, cached_tokens=80), None, 20.0),
        (ServerCounters(prompt_tokens=100, cached_tokens=80, prompt_ms=9000.0), 1000.0, 20.0),
        (ServerCounters(prompt_tokens=100, prompt_ms=50.0), 1000.0, 50.0),
        (ServerCounters(prompt_tokens=100, prompt_ms=5000.0), 1000.0, 100.0),
        (ServerCounters(prompt_tokens=100, prompt_ms=5000.0), None, None),
        (ServerCounters(prompt_tokens=100), 1000.0, None),
    ],
)
def test_read_tokens_come_from_a_count_or_from_the_time(
    counters: ServerCounters, rate: float | None, read_tokens: float | None
) -> None:
    assert count_read_tokens(counters, rate) == read_tokens
