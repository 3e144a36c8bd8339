from __future__ import annotations

from datetime import timedelta

import pytest

from gpumesh.cli.views.figures import (
    UNKNOWN,
    format_duration,
    format_gib,
    format_milliseconds,
    format_time_left,
    short_gpu,
    shorten,
    sparkline,
)
from tests.cli.states import AT


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "?"), (0, "0.0"), (5632, "5.5"), (24564, "24.0"), (102_400, "100"), (102_350, "100")]
)
def test_gib(value: int | None, shown: str) -> None:
    assert format_gib(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, UNKNOWN),
        (0.21, "0.2 ms"),
        (41.2, "41 ms"),
        (999.9, "1000 ms"),
        (1500, "1.5 s"),
        (75_000, "75 s"),
    ],
)
def test_milliseconds(value: float | None, shown: str) -> None:
    assert format_milliseconds(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0s"), (45.4, "45s"), (240, "4m"), (7200, "2h"), (172_800, "2d"), (59.9, "60s")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_time_left() -> None:
    assert format_time_left(None, AT) is None
    assert format_time_left(AT + timedelta(minutes=4), AT) == "4m"
    assert format_time_left(AT - timedelta(minutes=4), AT) == "0s"
    assert format_time_left(AT + timedelta(days=36_500), AT) == "∞"


def test_short_gpu() -> None:
    assert short_gpu("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert short_gpu("NVIDIA H100 80GB HBM3") == "H100 80GB HBM3"
    assert short_gpu("NVIDIA") == "NVIDIA"


def test_shorten() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("abcd", 3) == "ab…"
    assert shorten("abcd", 0) == "…"


def test_a_sparkline_distinguishes_unknown_zero_and_small_values() -> None:
    assert sparkline((None, 0, 0.4, 50, 100, 130), 100) == " ▁▂▅██"
    assert sparkline((), 100) == ""
