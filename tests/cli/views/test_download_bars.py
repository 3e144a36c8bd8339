from __future__ import annotations

import pytest

from gpumesh.cli.views.download_bars import format_step, show_downloads
from gpumesh.mesh.models.store_answers import StoreStep


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (StoreStep("verifying"), "verifying"),
        (StoreStep("pulling a", None, 0, 10), "pulling a 0 %"),
        (StoreStep("pulling a", None, 199, 1000), "pulling a 10 %"),
        (StoreStep("pulling a", None, 10, 10), "pulling a 100 %"),
        (StoreStep("pulling a", None, 11, 10), "pulling a 100 %"),
        (StoreStep("x" * 100), "x" * 59 + "…"),
    ],
)
def test_a_step_is_written_in_tenths(step: StoreStep, text: str) -> None:
    assert format_step(step) == text


def test_a_line_for_each_tenth_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    with show_downloads(quiet=False) as display:
        for part in range(101):
            display("a", StoreStep("pulling x", None, part, 100))
        display("b", StoreStep("pulling x", None, 100, 100))
        display("a", StoreStep("success"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        *(f"a: pulling x {tenth} %" for tenth in range(0, 101, 10)),
        "b: pulling x 100 %",
        "a: success",
    ]


def test_with_quiet_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with show_downloads(quiet=True) as display:
        display("a", StoreStep("pulling x", None, 1, 100))
    assert capsys.readouterr() == ("", "")
