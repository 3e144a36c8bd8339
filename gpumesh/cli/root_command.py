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
    """The callback of ``--version``: prints the version and ends the program, if the option is given."""
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
    """Runs the command line, and ends the process with its exit code. For an error that a person, a host or the system
    caused, prints a sentence and no traceback."""
    _prepare_streams()
    completion_scripts.install_completion_scripts()
    completion_scripts.filter_typer_completions()
    try:
        try:
            defer_parameters(get_command(app))(prog_name="gpumesh")
        finally:
            sys.stdout.flush()  # a failure to write is reported below, and not by Python when it exits
    except BaseExceptionGroup as group:
        # A task group wraps the errors of its tasks. If all of them are expected, the first is shown as the reason.
        _, unexpected = group.split(is_expected)
        if unexpected is not None:
            raise
        exit_with(next(flatten_group(group)))
    except BaseException as error:
        if not is_expected(error):
            raise
        exit_with(error)


def _prepare_streams() -> None:
    """Opens the standard streams that are closed. Makes the output streams replace characters that they cannot
    encode."""
    for descriptor in range(3):  # stdin, stdout, stderr
        try:
            os.fstat(descriptor)
        except OSError:
            # The stream was closed (`>&-`). The next file that is opened gets the lowest free descriptor, this one: so
            # open a file now that may receive our output.
            os.open(os.devnull, os.O_RDWR)
    # Python sets a stream that was closed at the start to None. 0, 1 and 2 are the descriptors from above.
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115  # open until the process ends
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show must not fail the command
