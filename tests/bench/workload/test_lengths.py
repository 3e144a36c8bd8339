"""Lengths of prompts and answers that are drawn from a distribution."""

from __future__ import annotations

from random import Random
from statistics import fmean, pstdev

import pytest

from gpumesh.bench.workload.lengths import parse_lengths


@pytest.mark.parametrize("text", ["64", "16-512", "128:40"])
def test_a_text_is_what_it_was_read_from(text: str) -> None:
    assert str(parse_lengths(text)) == text


def test_equal_lengths_need_no_draw() -> None:
    lengths = parse_lengths("64")
    assert lengths.is_fixed
    assert {lengths.draw(Random(seed)) for seed in range(9)} == {64}


def test_uniform_lengths_reach_both_ends() -> None:
    lengths, rng = parse_lengths("3-5"), Random(1)
    assert {lengths.draw(rng) for _ in range(100)} == {3, 4, 5}
    assert lengths.mean == 4.0


def test_normal_lengths_have_their_mean_and_deviation_and_are_never_below_one() -> None:
    lengths, rng = parse_lengths("200:50"), Random(1)
    drawn = [lengths.draw(rng) for _ in range(4000)]
    assert fmean(drawn) == pytest.approx(200, rel=0.02)
    assert pstdev(drawn) == pytest.approx(50, rel=0.05)
    wide = parse_lengths("1:50")
    assert min(wide.draw(rng) for _ in range(200)) == 1


@pytest.mark.parametrize("text", ["", "many", "5-3", "0-3", "0:4", "3-", "1.5", "4:x", "99999999999"])
def test_another_text_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"at least 1|write"):
        parse_lengths(text)
