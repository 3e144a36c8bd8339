from __future__ import annotations

import pytest

from gpumesh.cli.views.progress_bar import show_progress


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, "prompts", quiet=False) as tick:
        tick(1, "one failed")
        tick(3)
    assert capsys.readouterr() == ("", "")
