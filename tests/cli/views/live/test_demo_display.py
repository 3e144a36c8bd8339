from __future__ import annotations

import pytest

from gpumesh.cli.views.live.demo_display import DemoDisplay
from tests.cli.states import typical


def test_without_a_terminal_only_what_is_told_and_the_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with DemoDisplay() as scene:
        scene.print_line("Once \x1b[31mupon\x07 a time", "bold")
        scene.update_table(typical())
        assert capsys.readouterr().out == "Once [31mupon a time\n"
        scene.print_table(typical())
        assert "2 of 4 nodes up" in capsys.readouterr().out
    assert capsys.readouterr().out == ""
