"""The command line in the test's own process: much quicker than a process of its own, where that is all the same."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from typer.testing import CliRunner

from gpumesh.cli.error_exit import print_error
from gpumesh.cli.root_command import app
from gpumesh.errors import GPUMeshError


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def invoke(*words: str, code: int = 0, stdin: str | None = None) -> Ended:
    """Runs ``gpumesh`` with these words. Its exit code must be ``code``."""
    result = CliRunner().invoke(app, list(words), input=stdin, prog_name="gpumesh")
    err, ended_with = result.stderr, result.exit_code
    if isinstance(result.exception, GPUMeshError):  # what `run_app` does
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown):
            print_error(result.exception)
        err, ended_with = err + shown.getvalue(), int(result.exception.exit_code)
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert ended_with == code, f"exit {ended_with}\n--- stdout\n{result.stdout}\n--- stderr\n{err}"
    return Ended(ended_with, result.stdout, err)
