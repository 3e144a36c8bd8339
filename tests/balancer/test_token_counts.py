"""A server that counts its tokens wrongly is corrected by the bytes that we know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.balancer.rates.token_counts import (
    LEAST_BYTES_PER_TOKEN,
    MOST_BYTES_PER_TOKEN,
    NODE_FACTOR,
    TEXT_FACTOR,
    TokenCounts,
)

MODEL = "m:latest"


def answers(counts: TokenCounts | None = None, **bytes_per_token: float) -> TokenCounts:
    """The counts after 100 answers of each node, of so many bytes for each token that it has counted."""
    counts = counts or TokenCounts(least_bytes=64.0, may_hold_images=False)
    for _ in range(100):
        for node, size in bytes_per_token.items():
            counts.learn(node, MODEL, 100, 100.0 * size)
    return counts


def test_what_can_be_true_is_believed() -> None:
    counts = answers(a=3.0, b=3.0, c=3.2)
    assert counts.bytes_per_token(MODEL) == pytest.approx(3.0, rel=0.01)
    for tokens in (50, 100, 200):
        assert counts.correct("a", MODEL, tokens, 300.0) == tokens


@pytest.mark.parametrize("tokens", [None, 0, 10, 1000])
def test_what_cannot_be_true_is_replaced_by_what_is_usual(tokens: int | None) -> None:
    assert answers(a=3.0, b=3.0, c=3.0).correct("a", MODEL, tokens, 300.0) == 100


def test_a_node_that_always_counts_twice_as_much_as_the_others_is_scaled() -> None:
    counts = answers(a=4.0, b=4.0, liar=2.0)
    assert counts.correct("liar", MODEL, 200, 400.0) == pytest.approx(100, abs=2)
    assert counts.correct("liar", MODEL, 200, None) == pytest.approx(100, abs=2), "also where nothing was measured"
    assert counts.correct("a", MODEL, 100, None) == 100


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5, 2.0])
def test_of_two_nodes_the_one_nearer_to_english_is_believed(factor: float) -> None:
    counts = answers(honest=BYTES_PER_TOKEN, liar=BYTES_PER_TOKEN / factor)
    assert counts.bytes_per_token(MODEL) == pytest.approx(BYTES_PER_TOKEN)


def test_a_single_node_shows_what_is_usual_in_its_language() -> None:
    counts = answers(a=1.5)
    assert counts.bytes_per_token(MODEL) == pytest.approx(1.5, rel=0.01)
    assert counts.correct("a", MODEL, 100, 150.0) == 100


def test_a_prompt_with_images_is_neither_believed_nor_estimated() -> None:
    counts = TokenCounts(least_bytes=64.0, may_hold_images=True)
    assert counts.correct("a", MODEL, 300, 1e6) is None
    assert counts.correct("a", MODEL, None, 400.0) is None
    assert counts.correct("a", MODEL, 4000, 400.0) == 100, "no image makes many tokens of few bytes"


def test_a_short_text_is_left_alone() -> None:
    counts = answers(a=4.0)
    assert counts.correct("a", MODEL, 60, 63.0) == 60
    counts.learn("a", MODEL, 60, 63.0)
    assert counts.bytes_per_token(MODEL) == pytest.approx(4.0)


tokens = st.none() | st.integers(0, 1 << 40)


@given(st.lists(st.tuples(st.sampled_from("abcd"), tokens, st.none() | st.floats(0, 1e9)), max_size=60), tokens)
def test_no_lies_move_what_is_usual_beyond_its_bounds(
    lies: list[tuple[str, int | None, float | None]], said: int | None
) -> None:
    counts = TokenCounts(least_bytes=64.0, may_hold_images=False)
    for node, count, size in lies:
        counts.learn(node, MODEL, count, size)
    usual = counts.bytes_per_token(MODEL)
    assert LEAST_BYTES_PER_TOKEN * 0.99 <= usual <= MOST_BYTES_PER_TOKEN * 1.01
    corrected = counts.correct("a", MODEL, said, 4000.0)
    assert corrected is not None
    expected = 4000.0 / usual
    assert expected / TEXT_FACTOR - 1 <= corrected <= expected * TEXT_FACTOR + 1
    assert NODE_FACTOR < TEXT_FACTOR
