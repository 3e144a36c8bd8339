from __future__ import annotations

import subprocess
import sys

import pytest

from gpumesh import __version__
from tests.real.command import GPUMESH

RAISING = """
import sys
from gpumesh.cli import root_command
from gpumesh.errors import *
def failing(*args, **kwargs):
    {raising}
root_command.get_command = lambda app: failing
root_command.defer_parameters = lambda command: command
root_command.run_app()
"""


def test_version() -> None:
    done = subprocess.run([str(GPUMESH), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gpumesh {__version__}\n"


def test_a_character_that_stdout_cannot_encode_does_not_fail() -> None:
    script = RAISING.format(raising="print('Öl …'); raise GPUMeshError('Öl', hint='')")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.stdout == b"?l ?\n"
    assert done.stderr.decode() in ("error: ?l\n", "error: Öl\n")


@pytest.mark.parametrize("command", [("--help",), ("--version",)])
def test_a_full_disk_is_reported_in_one_sentence(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([str(GPUMESH), *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: no space left on device\nhint: make room there\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    for words, code in (("--version", 0), ("explain host-key-changed", 0), ("explain nothing-of-the-kind", 2)):
        done = subprocess.run(["sh", "-c", f"{GPUMESH} {words} {closed}"], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert (done.stdout != "") == (code == 0 and ">&-" not in closed.replace("2>&-", ""))
