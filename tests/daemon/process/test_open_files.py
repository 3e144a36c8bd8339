from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from gpumesh.daemon.process.open_files import candidate_limits, raise_file_limit

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "tried"),
    [
        (1024, 4096, (4096,)),
        (1024, 1 << 30, (65_536, 24_576, 10_240, 4_096)),
        (256, INFINITE, (65_536, 24_576, 10_240, 4_096)),  # macOS
        (1024, 20_000, (20_000, 10_240, 4_096)),
        (65_536, 1 << 20, ()),
        (100_000, 1 << 20, ()),
        (1024, 1024, ()),
        (INFINITE, INFINITE, ()),
    ],
)
def test_candidate_limits(soft: int, hard: int, tried: tuple[int, ...]) -> None:
    assert candidate_limits(soft, hard) == tried


def test_the_limit_is_raised_for_children_too_and_restored() -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(1024, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        with raise_file_limit() as raised:
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, hard)
            assert raised >= low
            told = subprocess.check_output(
                [sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"]
            )
            assert int(told) == raised
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_a_refused_limit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS does, whose hard limit says nothing."""
    held = [256, INFINITE]

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if limits[0] > 20_000:
            raise ValueError("current limit exceeds maximum limit")
        held[:] = limits

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(held))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    with raise_file_limit() as raised:
        assert raised == held[0] == 10_240
    assert held == [256, INFINITE]
