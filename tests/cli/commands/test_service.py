"""`gpumesh service` where systemd is missing or refuses, and before it is asked. tests/real has a real systemd."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpumesh.cli.root_command import app
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.paths import for_config
from gpumesh.daemon.service import systemd
from gpumesh.errors import GPUMeshError

MESH = {
    "gateway": {"listen": "127.0.0.1:0", "api_key_env": "MESH_KEY"},
    "nodes": [{"name": "${NODE_NAME}", "backend": {"url": "http://127.0.0.1:${PORT:-1}"}}],
}
# Answers as systemd does of a service that runs, and writes down what it is asked.
STAND_IN = """#!/bin/sh
echo "$@" >>"$HOME/calls"
case "$*" in
    --version) echo "systemd 254 (254.1-1)" ;;
    *Version*) [ ! -e "$HOME/no-bus" ] || { echo "Failed to connect to bus: No medium found" >&2; exit 1; } ;;
    *" show "*) printf '%s\\n' ActiveState=active SubState=running UnitFileState=enabled MainPID=4711 NRestarts=2 ;;
esac
"""


class Home:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "mesh.yaml"
        self.unit = folder / ".config" / "systemd" / "user" / "gpumesh.service"
        self.variables_file = folder / ".config" / "gpumesh" / "secrets.env"

    def service(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["-c", str(self.config), "service", *arguments])

    def fails(self, *arguments: str) -> GPUMeshError:
        result = self.service(*arguments)
        assert isinstance(result.exception, GPUMeshError), result.output
        return result.exception


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("NODE_NAME", "alpha")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    made = Home(tmp_path)
    made.config.write_text(json.dumps(MESH))
    return made


def test_print_changes_nothing_and_needs_no_systemd(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "BOOTED", home.folder / "missing")
    printed = home.service("install", "--print")
    assert printed.exit_code == 0
    assert f"Environment=GPUMESH_CONFIG={home.config}\n" in printed.stdout
    assert f"EnvironmentFile=-{home.variables_file}\n" in printed.stdout
    assert "RestartSteps" in printed.stdout, "this systemd knows it"
    assert not home.unit.exists()
    monkeypatch.setenv("SUDO_USER", "ada")
    of_system = home.service("install", "--print", "--system").stdout
    assert "\nUser=ada\n" in of_system
    assert "\nEnvironmentFile=-/etc/gpumesh/secrets.env\n" in of_system
    assert "\nWantedBy=multi-user.target\n" in of_system


def test_without_systemd(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "BOOTED", home.folder / "missing")
    for command in ("install", "uninstall", "status"):
        error = home.fails(command)
        assert "not run by systemd" in error.message
        assert "--print" in str(error.hint)
        assert "/etc/wsl.conf" in str(error.hint)


def test_a_user_whose_systemd_cannot_be_reached(home: Home) -> None:
    (home.folder / "no-bus").touch()
    error = home.fails("install")
    assert error.message == "the systemd of your user cannot be reached: Failed to connect to bus: No medium found"
    assert "--system" in str(error.hint)
    assert not home.unit.exists()


def test_install_tells_which_variables_are_missing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_KEY", raising=False)
    installed = home.service("install")
    assert installed.exit_code == 0, installed.output
    assert "mesh.yaml names MESH_KEY and NODE_NAME, and a service has only what" in installed.stdout
    assert "`systemctl --user restart gpumesh`" in installed.stdout
    assert stat.S_IMODE(home.unit.stat().st_mode) == 0o644
    asked = (home.folder / "calls").read_text()
    assert asked.index("daemon-reload") < asked.index("enable gpumesh.service") < asked.index("restart gpumesh.service")

    monkeypatch.setenv("MESH_KEY", "planted-key")
    assert "mesh.yaml names" not in home.service("install", "--save-variables").stdout
    assert home.variables_file.read_text().endswith('MESH_KEY="planted-key"\nNODE_NAME="alpha"\n')
    home.variables_file.chmod(0o644)
    document = json.loads(home.service("status", "--json").stdout)
    assert (document["variables"], document["missing_variables"]) == (["MESH_KEY", "NODE_NAME"], [])
    shown = home.service("status").stdout
    assert f"unit       {home.unit}\n" in shown
    assert "state      active (running), pid 4711, started again 2 times\n" in shown
    assert "others can read that file: `chmod 600` it" in shown
    assert "planted" not in shown


def test_units_of_others_are_left_alone(home: Home) -> None:
    home.unit.parent.mkdir(parents=True)
    home.unit.write_text("[Service]\n")
    for command in ("install", "uninstall"):
        assert f"{home.unit} was not written by `gpumesh service install`" in home.fails(command).message
    assert home.unit.read_text() == "[Service]\n"
    assert home.service("install", "--force").exit_code == 0
    home.config.rename(home.folder / "other.yaml")
    home.config = home.folder / "other.yaml"
    assert "runs another mesh.yaml" in home.fails("install").message
    assert home.service("install", "--name", "other").exit_code == 0
    assert home.service("uninstall").exit_code == 0
    assert not home.unit.exists()
    assert "there is no service gpumesh to uninstall" in home.fails("uninstall").message
    home.unit.symlink_to(os.devnull)  # as `systemctl mask` does
    assert "was not written by" in home.fails("install").message


def test_a_mesh_that_runs_already_is_not_the_services(home: Home) -> None:
    lock = MeshLock.acquire(for_config(home.config))
    try:
        error = home.fails("install")
        assert f"runs already, not as a service (pid {os.getpid()})" in error.message
        assert "`gpumesh down`" in str(error.hint)
        assert not home.unit.exists()
    finally:
        for_config(home.config).remove_files()
        lock.release()


def test_a_name_that_cannot_be_a_services(home: Home) -> None:
    assert "cannot be a service's name" in home.fails("install", "--name", "../x").message
