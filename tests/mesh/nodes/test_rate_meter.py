import pytest

from gpumesh.mesh.nodes.rate_meter import WINDOW_S, RateMeter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_is_the_mean_over_the_window() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    assert meter.rate() == 0.0
    for _ in range(300):
        meter.add(1)
        clock.now += 0.01
    assert meter.rate() == pytest.approx(100.0, rel=0.02)


def test_counts_older_than_the_window_are_forgotten() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    meter.add(500)
    clock.now += WINDOW_S + 1.0
    assert meter.rate() == 0.0
