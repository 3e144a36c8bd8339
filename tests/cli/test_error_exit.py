from __future__ import annotations

import re
import subprocess
import sys

import pytest

from gpumesh.cli.error_exit import print_error
from gpumesh.config.mesh_file.reader import MAX_PROBLEMS
from gpumesh.errors import AuthRefused, ConfigError, GPUMeshError, NoNodeError, Problem


def printed(error: GPUMeshError, capsys: pytest.CaptureFixture[str]) -> str:
    print_error(error)
    out, err = capsys.readouterr()
    assert out == "", "stdout is for results"
    return err


def test_an_error_is_a_sentence_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    error = AuthRefused("the host refuses the login of root", hint="check the key", node="iceland")
    assert printed(error, capsys) == "error: iceland: the host refuses the login of root\nhint: check the key\n"
    assert printed(GPUMeshError("no", hint=""), capsys) == "error: no\n"


def test_a_node_in_the_message_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(NoNodeError("iceland is down", node="iceland", hint=""), capsys) == "error: iceland is down\n"


def test_problems_of_a_config_error_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    one = Problem("is missing", "mesh.yaml", 3, 5, "nodes[0].name")
    assert printed(ConfigError((one,)), capsys) == "error: mesh.yaml:3:5: nodes[0].name: is missing\n"
    assert printed(ConfigError((one, one)), capsys).splitlines() == [
        "error: 2 problems in the configuration",
        *["mesh.yaml:3:5: nodes[0].name: is missing"] * 2,
    ]
    many = printed(ConfigError((one,) * (MAX_PROBLEMS + 1)), capsys)
    assert many.startswith(f"error: more than {MAX_PROBLEMS} problems")


def test_hostile_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(GPUMeshError("a\x1b[31mb\x07", hint="c\x9bd", node="\x1b]0;x"), capsys)
    assert text == "error: ]0;x: a[31mb\nhint: cd\n"


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


@pytest.mark.parametrize(
    ("raising", "code", "err"),
    [
        ("raise GPUMeshError('a', hint='b')", 1, "error: a\nhint: b\n"),
        ("raise UsageError('a')", 2, "error: a\n"),
        ("raise NoNodeError('a', hint='')", 4, "error: a\n"),
        ("raise ModelMissing('m', hint='')", 4, "error: no node that is up has the model 'm'\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise BrokenPipeError", 1, ""),
        ("raise ExceptionGroup('x', [UsageError('a'), GPUMeshError('b')])", 2, "error: a\n"),
        ("raise ExceptionGroup('x', [ExceptionGroup('y', [NoNodeError('a', hint='')])])", 4, "error: a\n"),
        ("raise ExceptionGroup('x', [BrokenPipeError()])", 1, ""),
        ("raise BaseExceptionGroup('x', [KeyboardInterrupt()])", 130, ""),
        ("raise OSError(28, 'No space left on device')", 1, "error: no space left on device\nhint: make room there\n"),
        (
            "raise OSError(27, 'File too large', 'a')",
            1,
            "error: a: file too large\nhint: `ulimit -f unlimited` allows longer files\n",
        ),
        ("raise PermissionError(13, 'Permission denied', 'a/b')", 1, "error: a/b: permission denied\n"),
    ],
)
def test_exit_codes(raising: str, code: int, err: str) -> None:
    script = RAISING.format(raising=raising)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


@pytest.mark.parametrize(
    "raising",
    [
        "raise ValueError('a bug')",
        "raise FileNotFoundError(2, 'a ValueError of ours')",
        "raise ExceptionGroup('x', [UsageError('a'), ValueError()])",
    ],
)
def test_a_bug_is_not_hidden(raising: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAISING.format(raising=raising)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert re.search("ValueError", done.stderr)
