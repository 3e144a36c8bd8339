"""Units and agents: what stands in them, who has written them; the file with the service's variables."""

from __future__ import annotations

import os
import plistlib
import stat
import subprocess
from pathlib import Path

import pytest

from gpumesh.daemon.service.definition import FileOrigin, ServiceDefinition, find_origin, is_valid_name
from gpumesh.daemon.service.launchd_agent import COMMENT_END, make_agent
from gpumesh.daemon.service.systemd_unit import make_unit
from gpumesh.daemon.service.variables_file import add_variables, is_private, read_names
from gpumesh.errors import UsageError
from tests.prerequisites import needs

ODD = Path('/home/ada/my "mesh" $HOME 100%/a;b\\c.yaml')
DEFINITION = ServiceDefinition("gpumesh", ("/opt/a b/gpumesh",), ODD, Path("/home/ada/my secrets.env"))


def assignments(unit: str, key: str) -> list[str]:
    return [line.removeprefix(f"{key}=") for line in unit.splitlines() if line.startswith(f"{key}=")]


def test_the_unit_brings_the_mesh_back_and_stops_it_in_order() -> None:
    unit = make_unit(DEFINITION)
    assert assignments(unit, "Type") == ["notify"]
    assert assignments(unit, "Restart") == ["on-failure"]
    assert assignments(unit, "RestartSec") == ["500ms"]
    assert assignments(unit, "StartLimitIntervalSec") == ["0"], "else it would be given up after five crashes"
    assert assignments(unit, "RestartPreventExitStatus") == ["2"]
    assert assignments(unit, "KillMode") == ["mixed"], "else ssh would get SIGTERM while the mesh drains"
    assert int(assignments(unit, "TimeoutStopSec")[0]) > 20
    assert assignments(unit, "User") == []


def test_names_in_the_unit_are_read_as_they_are() -> None:
    unit = make_unit(DEFINITION)
    assert assignments(unit, "ExecStart") == ['"/opt/a b/gpumesh" up --quiet']
    assert assignments(unit, "ExecReload") == ['"/opt/a b/gpumesh" reload']
    assert assignments(unit, "Environment") == [
        r'"GPUMESH_CONFIG=/home/ada/my \"mesh\" $HOME 100%%/a;b\\c.yaml"'  # Environment= expands no $
    ]
    assert assignments(unit, "EnvironmentFile") == ["-/home/ada/my secrets.env"]


def test_longer_waits_only_where_systemd_knows_them() -> None:
    assert "RestartSteps" not in make_unit(DEFINITION)
    assert "RestartSteps" not in make_unit(DEFINITION, systemd_version=252)
    assert "RestartSteps" in make_unit(DEFINITION, systemd_version=254)


@needs("systemd")
@pytest.mark.real
def test_systemd_has_nothing_to_say_against_the_unit_of_the_system(tmp_path: Path) -> None:
    config = tmp_path / ODD.name
    config.touch()
    program = tmp_path / "a b" / "gpumesh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "gpumesh.service"
    unit.write_text(make_unit(ServiceDefinition("gpumesh", (str(program),), config, tmp_path / "x.env", "root")))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_tells_who_has_written_it() -> None:
    unit = make_unit(DEFINITION)
    agent = make_agent(DEFINITION, log=Path("/x.log"))
    assert find_origin(None) is FileOrigin.MISSING
    assert find_origin("") is find_origin("[Unit]\n") is FileOrigin.FOREIGN
    for text, end in ((unit, ""), (agent, COMMENT_END)):
        assert find_origin(text, comment_end=end) is FileOrigin.OURS
        assert find_origin(f"{text}\n", comment_end=end) is FileOrigin.CHANGED
        assert find_origin(text.replace("gpumesh up", "x").replace("65536", "1"), comment_end=end) is FileOrigin.CHANGED


def test_the_agent_starts_the_mesh_with_its_variables(tmp_path: Path) -> None:
    """The program of the agent is run here as launchd would run it."""
    program = tmp_path / "a b" / "gpumesh"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$SECRET" "$GPUMESH_CONFIG"\n')
    program.chmod(0o755)
    variables = tmp_path / "my $(touch x) secrets.env"
    definition = ServiceDefinition("gpumesh", (str(program),), ODD, variables)
    agent = plistlib.loads(make_agent(definition, log=tmp_path / "log").encode())
    assert agent["Label"] == "io.gpumesh"
    assert agent["KeepAlive"] == {"SuccessfulExit": False}

    def run() -> list[str]:
        environment = {"PATH": os.environ["PATH"], **agent["EnvironmentVariables"]}
        return subprocess.run(
            agent["ProgramArguments"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert run() == ["up", "--quiet", "", str(ODD)]
    add_variables(variables, {"SECRET": ODD.name * 2 + " `x` '"})
    assert run() == ["up", "--quiet", ODD.name * 2 + " `x` '", str(ODD)]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["", "-x", "../x", "a b", "x\n", "é"])
def test_what_cannot_be_a_services_name(name: str) -> None:
    assert not is_valid_name(name)
    assert is_valid_name("gpumesh-2.home")


def test_the_variables_file_keeps_its_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secrets.env"
    assert read_names(path) == frozenset()
    add_variables(path, {"B": "2"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# mine\nA=1\nexport B='old'\nEMPTY=\nC=3")
    path.chmod(0o644)
    assert not is_private(path)
    add_variables(path, {"B": 'a"b\\c$d`e', "D": "4"})
    assert path.read_text() == '# mine\nA=1\nEMPTY=\nC=3\nB="a\\"b\\\\c\\$d\\`e"\nD="4"\n'
    assert is_private(path)
    assert read_names(path) == {"A", "B", "C", "D"}
    with pytest.raises(UsageError, match="more than one line"):
        add_variables(path, {"E": "1\n2"})
