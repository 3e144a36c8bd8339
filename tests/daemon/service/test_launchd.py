"""What launchd is asked for: a stand-in for `launchctl` writes it down, and remembers what is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumesh.daemon.service.definition import FileOrigin, ServiceDefinition
from gpumesh.daemon.service.launchd import Launchd
from gpumesh.errors import GPUMeshError

STAND_IN = """#!/bin/sh
echo "$@" >>"$HOME/calls"
case $1 in
    bootstrap) touch "$HOME/loaded" ;;
    bootout) rm "$HOME/loaded" ;;
    print) [ -e "$HOME/loaded" ] && printf 'io.gpumesh = {\\n\\tstate = running\\n\\truns = 3\\n\\tpid = 4711\\n}\\n' ;;
    kickstart) [ ! -e "$HOME/broken" ] || { echo "Could not kickstart service" >&2; exit 3; } ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "launchctl"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_an_agent_is_loaded_once_and_anew_when_it_was_changed(home: Path) -> None:
    launchd = Launchd()
    definition = ServiceDefinition("gpumesh", ("/x/gpumesh",), home / "mesh.yaml", home / "secrets.env")
    agent, target = launchd.path("gpumesh"), f"gui/{os.getuid()}/io.gpumesh"
    assert agent == home / "Library" / "LaunchAgents" / "io.gpumesh.plist"
    assert launchd.origin(launchd.render(definition)) is FileOrigin.OURS
    assert launchd.state("gpumesh").state == "not loaded"

    def calls() -> list[str]:
        lines = (home / "calls").read_text().splitlines()
        (home / "calls").unlink()
        return [line for line in lines if not line.startswith("print ")]

    started = [f"enable {target}", f"kickstart {target}"]
    calls()
    launchd.start("gpumesh", is_new=True)
    assert calls() == [f"bootstrap gui/{os.getuid()} {agent}", *started]
    launchd.start("gpumesh", is_new=False)
    assert calls() == started
    launchd.start("gpumesh", is_new=True)
    assert calls() == [f"bootout {target}", f"bootstrap gui/{os.getuid()} {agent}", *started]
    state = launchd.state("gpumesh")
    assert (state.is_active, state.pid, state.restarts) == (True, 4711, 2)
    launchd.stop("gpumesh")
    launchd.stop("gpumesh")
    assert calls() == [f"bootout {target}"]


def test_launchds_own_words(home: Path) -> None:
    (home / "broken").touch()
    with pytest.raises(GPUMeshError, match=r"`launchctl kickstart .*` failed with 3: Could not kickstart service"):
        Launchd().start("gpumesh", is_new=True)
