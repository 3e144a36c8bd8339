from __future__ import annotations

import pytest

from gpumesh.cli.views.download_bars import downloads, in_tenths
from gpumesh.mesh.models.model_store import Step


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Step("verifying"), "verifying"),
        (Step("pulling a", 0, 10), "pulling a 0 %"),
        (Step("pulling a", 199, 1000), "pulling a 10 %"),
        (Step("pulling a", 10, 10), "pulling a 100 %"),
        (Step("pulling a", 11, 10), "pulling a 100 %"),
    ],
)
def test_in_tenths(step: Step, said: str) -> None:
    assert in_tenths(step) == said


def test_a_line_for_each_tenth_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    with downloads(quiet=False) as shown:
        for part in range(101):
            shown("a", Step("pulling x", part, 100))
        shown("b", Step("pulling x", 100, 100))
        shown("a", Step("success"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        *(f"a: pulling x {tenth} %" for tenth in range(0, 101, 10)),
        "b: pulling x 100 %",
        "a: success",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with downloads(quiet=True) as shown:
        shown("a", Step("pulling x", 1, 100))
    assert capsys.readouterr() == ("", "")
