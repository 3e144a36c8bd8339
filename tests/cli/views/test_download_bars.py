from __future__ import annotations

import pytest

from gpumesh.cli.views.download_bars import format_step, show_downloads
from gpumesh.mesh.models.model_store import PullProgress


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (PullProgress("verifying"), "verifying"),
        (PullProgress("pulling a", 0, 10), "pulling a 0 %"),
        (PullProgress("pulling a", 199, 1000), "pulling a 10 %"),
        (PullProgress("pulling a", 10, 10), "pulling a 100 %"),
        (PullProgress("pulling a", 11, 10), "pulling a 100 %"),
    ],
)
def test_in_tenths(step: PullProgress, said: str) -> None:
    assert format_step(step) == said


def test_a_line_for_each_tenth_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    with show_downloads(quiet=False) as shown:
        for part in range(101):
            shown("a", PullProgress("pulling x", part, 100))
        shown("b", PullProgress("pulling x", 100, 100))
        shown("a", PullProgress("success"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        *(f"a: pulling x {tenth} %" for tenth in range(0, 101, 10)),
        "b: pulling x 100 %",
        "a: success",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with show_downloads(quiet=True) as shown:
        shown("a", PullProgress("pulling x", 1, 100))
    assert capsys.readouterr() == ("", "")
