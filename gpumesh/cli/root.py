"""The command `gpumesh`: its own options, its streams, its errors, its exit codes. ``main`` runs it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from gpumesh import __version__
from gpumesh.cli import completion
from gpumesh.cli.context import ConfigOption, GlobalOptions, QuietOption, VerboseOption
from gpumesh.cli.lazy import LazyGroup, defer_parameters
from gpumesh.errors import ConfigError, ExitCode, GPUMeshError

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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpumesh {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: ConfigOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Your GPUs behind SSH as one fast endpoint."""
    del version  # its callback has ended the program if it was asked for
    ctx.obj = GlobalOptions(config, quiet, verbose)


def run_app() -> None:
    """Never returns; never shows a traceback for what is a person's or a host's doing."""
    _prepare_streams()
    completion.install_completion_scripts()
    completion.sanitize_completions()
    try:
        try:
            defer_parameters(get_command(app))(prog_name="gpumesh")
        finally:
            sys.stdout.flush()  # what cannot be written is told below, and not by Python at its end
    except BaseExceptionGroup as group:
        # A task group wraps what its tasks raise: if that is nothing but what is expected, the first is the reason.
        _, others = group.split(_expected)
        if others is not None:
            raise
        _end_with(next(_leaves(group)))
    except BaseException as error:
        if not _expected(error):
            raise
        _end_with(error)


def _prepare_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed (`>&-`): whatever is opened next would become our output.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115  # open until the process ends
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show is no reason to fail


# What the system refuses, wherever it happens: the disk, the permissions and the limits are not of our making.
_SURROUNDINGS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "",
    errno.EIO: "",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EMFILE: "`ulimit -n 4096` allows more open files",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs",
}


def _expected(error: BaseException) -> bool:
    return isinstance(error, (GPUMeshError, BrokenPipeError, KeyboardInterrupt)) or (
        isinstance(error, OSError) and error.errno in _SURROUNDINGS
    )


def _end_with(error: BaseException) -> NoReturn:
    if isinstance(error, GPUMeshError):
        print_error(error)
        sys.exit(int(error.exit_code))
    if isinstance(error, OSError):
        # Who read our output has enough of it, or there is no room for it; and for what is left in our buffer neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            where = f"{error.filename}: " if error.filename else ""
            hint = _SURROUNDINGS.get(error.errno or 0, "")
            print_error(GPUMeshError(f"{where}{(error.strerror or str(error)).lower()}", hint=hint))
        sys.exit(int(ExitCode.FAILED))
    sys.exit(int(ExitCode.INTERRUPTED))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def print_error(error: GPUMeshError) -> None:
    """One sentence that says what is wrong and where, and what to do; a ConfigError's problems one below the other."""
    from gpumesh.cli.text import clean_text

    node = f"{error.node}: " if error.node and error.node not in error.message else ""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        from gpumesh.config.reader import MAX_PROBLEMS

        more = len(error.problems) > MAX_PROBLEMS  # the last one tells how many are left out
        count = f"more than {MAX_PROBLEMS}" if more else len(error.problems)
        lines = [f"error: {count} problems in the configuration", *map(str, error.problems)]
    else:
        lines = [f"error: {node}{error.message}"]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    typer.echo(clean_text("\n".join(lines)), err=True)
