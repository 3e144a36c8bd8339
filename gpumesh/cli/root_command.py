"""The command `gpumesh` itself: its own options, its standard streams, and its end after an error."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer
from typer.main import get_command

from gpumesh import __version__
from gpumesh.cli import completion_scripts
from gpumesh.cli.command_group import LazyGroup
from gpumesh.cli.deferred_parameters import defer_parameters
from gpumesh.cli.error_exit import exit_with, flatten_group, is_expected
from gpumesh.cli.global_options import ConfigOption, GlobalOptions, QuietOption, VerboseOption

EPILOG = """\b
Examples:
  gpumesh demo                        try it, nothing to configure
  gpumesh init --from 'ssh root@203.0.113.7 -p 13323'
  gpumesh up -d && gpumesh status     run it in the background, look at it
  gpumesh run "Why is the sky blue?"
  gpumesh run -f prompts.txt > answers.jsonl

\b
Exit codes: 0 fine, 1 failed, 2 usage or configuration, 3 degraded, 4 no node can serve, 130 interrupted.
"""

app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"gpumesh {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Your GPUs behind SSH as one fast endpoint."""
    del version  # its callback ends the program
    ctx.obj = GlobalOptions(config, quiet, verbose)


def run_app() -> None:
    """Runs the command line; never returns. Shows no traceback for an error that a person or a host caused."""
    _prepare_streams()
    completion_scripts.install_completion_scripts()
    completion_scripts.filter_typer_completions()
    try:
        try:
            defer_parameters(get_command(app))(prog_name="gpumesh")
        finally:
            sys.stdout.flush()  # a failure to write is reported below, and not by Python when it exits
    except BaseExceptionGroup as group:
        # A task group wraps the errors of its tasks. If all of them are expected, the first is the reason.
        _, unexpected = group.split(is_expected)
        if unexpected is not None:
            raise
        exit_with(next(flatten_group(group)))
    except BaseException as error:
        if not is_expected(error):
            raise
        exit_with(error)


def _prepare_streams() -> None:
    """Opens the standard streams that are closed. Replaces characters that an output stream cannot encode."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The stream was closed (`>&-`). The next file that we open would get its number and become our output.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115  # open until the process ends
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show must not fail the command
