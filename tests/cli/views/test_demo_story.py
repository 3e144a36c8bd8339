from __future__ import annotations

import pytest

from gpumesh.cli.views.demo_story import Scene
from tests.cli.states import typical


def test_without_a_terminal_only_what_is_told_and_the_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with Scene() as scene:
        scene.say("Once \x1b[31mupon\x07 a time", "bold")
        scene.update(typical())
        assert capsys.readouterr().out == "Once [31mupon a time\n"
        scene.picture(typical())
        assert "2 of 4 nodes up" in capsys.readouterr().out
    assert capsys.readouterr().out == ""
