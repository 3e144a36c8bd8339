from __future__ import annotations

import pytest

from gpumesh.cli.views.progress_bar import show_progress


def test_progress_says_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(3, "prompts", quiet=False) as tick:
        tick(1, "one failed")
        tick(3)
    assert capsys.readouterr() == ("", "")
