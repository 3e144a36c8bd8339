"""`gpumesh batch`: many requests of a file, which the mesh works on in its gaps and which outlive every process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli import completion
from gpumesh.cli.batch.mesh_hints import print_mesh_hint, print_model_hint
from gpumesh.cli.batch.open_batches import open_batches
from gpumesh.cli.command_group import new_app
from gpumesh.cli.duration_option import DURATION_METAVAR, duration_parser
from gpumesh.cli.global_options import GlobalOptions, find_node, global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.cli.open_session import run_async
from gpumesh.cli.output_format import OutputFormat, choose_format, output_option, print_document, print_names
from gpumesh.cli.prompt_options import ModelSettingsOption, NodeOption, SystemOption
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import ExitCode, UsageError
from gpumesh.text.quoting import paste_command

if TYPE_CHECKING:
    from gpumesh.batches.base import BatchStore
    from gpumesh.batches.progress import BatchProgress
    from gpumesh.batches.values import Batch
    from gpumesh.cli.batch.changes import Changes

LISTED = 20  # batches that `list` shows without --all
ALL_LIMIT = 100_000

BatchArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="BATCH",
        help="The id or its beginning; the latest batch if not given.",
        autocompletion=completion.complete_batches,
    ),
]
BatchesArgument = Annotated[
    list[str],
    typer.Argument(metavar="BATCH...", help="The ids or their beginnings.", autocompletion=completion.complete_batches),
]
JsonOption = Annotated[bool, json_option("As JSON: gpumesh.batch/1.")]
FormatOption = Annotated[OutputFormat | None, output_option()]

app = new_app(invoke_without_command=True)


@app.callback()
def batch(ctx: typer.Context, as_json: JsonOption = False, output: FormatOption = None) -> None:
    """Many requests of a file, worked on in the gaps of the mesh until each has a result. Without a command: list.

    \b
    Examples:
      gpumesh batch submit prompts.jsonl -m qwen2.5:7b
      gpumesh batch show --watch
      gpumesh batch results -o answers.jsonl
    """
    if ctx.invoked_subcommand is None:
        _list_batches(global_options(ctx), choose_format(output, as_json), limit=LISTED)
    elif as_json or output is not None:
        hint = paste_command("gpumesh batch {COMMAND} --json", COMMAND=ctx.invoked_subcommand)
        raise UsageError("--json and -o belong behind the command", hint=hint)


# -- submit ----------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A prompt a line, or JSON lines; - is stdin.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Of prompts that name none; of all OpenAI lines. Else the default model.",
            autocompletion=completion.complete_models,
        ),
    ] = None,
    window: Annotated[
        float,
        typer.Option(
            metavar=DURATION_METAVAR,
            parser=duration_parser(1.0),
            show_default="24h",
            help="What has no result after this time fails.",
        ),
    ] = 24 * 3600.0,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="Shown by list; else the file's name.")] = None,
    node: NodeOption = None,
    system: SystemOption = None,
    option: ModelSettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a file of requests as a batch, and print its id. The running mesh works on it, or the next one that runs.

    The file has OpenAI's batch lines (custom_id, method, url, body), the JSON lines of `run -f`, or a prompt on
    each line. A wrong line is reported by its number, and the others are sent; the exit code is 3 then.

    \b
    Examples:
      gpumesh batch submit prompts.txt -m qwen2.5:7b
      gpumesh batch submit requests.jsonl --window 8h
      make-prompts | gpumesh batch submit - --name nightly
    """
    import os

    from gpumesh.cli.batch.submit import list_wrong_lines, submit_file
    from gpumesh.cli.batch.submitted_file import PromptSettings, SubmittedFile
    from gpumesh.cli.prompt_input import read_options
    from gpumesh.cli.standard_input import open_rereadable
    from gpumesh.cli.views.pool.start_progress import show_waiting

    options = global_options(ctx)
    if node is not None:
        find_node(options.topology(), node)
    settings = PromptSettings(model, node, system, read_options(option or []))
    shown_name = "stdin" if file == "-" else file

    async def store_file(submitted: SubmittedFile) -> Batch:
        async with open_batches(options) as store:
            return await submit_file(store, submitted, name=name or os.path.basename(shown_name), window_s=window)

    # Reads a pipe to its end first, where Ctrl-C ends the command at once.
    with open_rereadable(file) as source, show_waiting(f"stores {shown_name}", quiet=options.quiet):
        batch = run_async(store_file(SubmittedFile(source, settings, name=shown_name)))
    for line in list_wrong_lines(batch, shown_name):
        typer.echo(clean_line(line), err=True)
    if as_json:
        from gpumesh.batches.progress import BatchProgress
        from gpumesh.cli.batch.document import make_document

        print_json(make_document([BatchProgress(batch)]))
    else:
        typer.echo(batch.id)
    if not options.quiet:
        from gpumesh.cli.views.batch.sentences import describe_submission

        typer.echo(describe_submission(batch), err=True)
        print_mesh_hint(options)
        if model is not None:
            print_model_hint(options, model)
    if batch.error_count:
        raise typer.Exit(int(ExitCode.DEGRADED))


# -- list, show ------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    ctx: typer.Context,
    show_all: Annotated[bool, typer.Option("--all", "-a", help=f"Not only the {LISTED} latest.")] = False,
    as_json: JsonOption = False,
    output: FormatOption = None,
) -> None:
    """The batches of this mesh.yaml, the latest first. A batch is kept for 30 days after its end.

    \b
    Examples:
      gpumesh batch list
      gpumesh batch list --json | jq -r '.batches[] | select(.failed > 0) | .id'
    """
    _list_batches(global_options(ctx), choose_format(output, as_json), limit=ALL_LIMIT if show_all else LISTED)


def _list_batches(options: GlobalOptions, chosen_format: str | None, *, limit: int) -> None:
    """Prints the ``limit`` latest batches."""
    from gpumesh.batches.progress import measure_progress
    from gpumesh.cli.batch.document import make_document
    from gpumesh.cli.batch.find_batch import read_latest

    async def read() -> list[BatchProgress]:
        async with open_batches(options) as store:
            now = time()
            return [await measure_progress(store, found, now) for found in await read_latest(store, limit + 1)]

    found = run_async(read())
    shown = found[:limit]
    if chosen_format == OutputFormat.NAME:
        print_names(progress.batch.id for progress in shown)
    elif chosen_format not in (None, OutputFormat.WIDE):
        print_document(make_document(shown), chosen_format)
    elif not shown:
        typer.echo("there are no batches; `gpumesh batch submit FILE` makes one")
    else:
        from gpumesh.cli.views.batch.batch_table import print_batches

        print_batches(shown, time(), wide=chosen_format == OutputFormat.WIDE)
    if not options.quiet:
        if len(found) > limit:
            typer.echo(f"these are the {limit} latest; --all shows the others too", err=True)
        if any(not progress.batch.status.has_ended for progress in shown):
            print_mesh_hint(options)


@app.command()
def show(
    ctx: typer.Context,
    batch: BatchArgument = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay until it has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a batch is, what it waits for, and why requests have failed; also the wrong lines of its file.

    \b
    Examples:
      gpumesh batch show
      gpumesh batch show --watch
      gpumesh batch show batch_6f3a --json | jq '.batches[0].left_s'
    """
    from gpumesh.cli.batch.document import make_document
    from gpumesh.cli.batch.read_batch import read_progress

    options = global_options(ctx)
    progress = run_async(read_progress(options, batch, watch=watch))
    if as_json:
        print_json(make_document([progress]))
    else:
        from gpumesh.cli.views.batch.batch_view import print_batch

        print_batch(progress, time())
    if not progress.batch.status.has_ended:
        print_mesh_hint(options)


# -- results ---------------------------------------------------------------------------------------------------------


@app.command()
def results(
    ctx: typer.Context,
    batch: BatchArgument = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="Write them to this file.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until the batch has ended, and write results as they come.")
    ] = False,
    only_failed: Annotated[bool, typer.Option("--failed", help="Only those that have failed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of -o.")] = False,
    as_json: Annotated[bool, json_option("Changes nothing: results are JSON lines in any case.")] = False,
) -> None:
    """Print the results that there are, as JSON lines: those of OpenAI's API, or for prompts those of `run -f`.

    They stand in the order of the file; with --follow in the order in which they come. A request that has failed has
    its `error` set, and the exit code is 1 then. The file of -o gets its name when it is whole; with --follow it grows.

    \b
    Examples:
      gpumesh batch results > answers.jsonl
      gpumesh batch results batch_6f3a -o answers.jsonl
      gpumesh batch results --follow | jq -r .response
    """
    from gpumesh.cli.batch.read_batch import write_results

    del as_json
    options = global_options(ctx)
    found, copied = run_async(write_results(options, batch, out, follow=follow, only_failed=only_failed, force=force))
    if not options.quiet:
        from gpumesh.cli.views.batch.sentences import describe_results

        for line in describe_results(found, out, written=copied.written, failed=copied.failed, only_failed=only_failed):
            typer.echo(clean_line(line), err=True)
    is_whole = found.status.has_ended and not found.counts.unfinished
    if not only_failed and (copied.failed or (follow and not is_whole)):
        raise typer.Exit(int(ExitCode.FAILED))


# -- retry, cancel, rm -----------------------------------------------------------------------------------------------


@app.command()
def retry(ctx: typer.Context, batches: BatchesArgument, as_json: JsonOption = False) -> None:
    """Send what has failed, or has no result, again. The batch must have ended; its window starts anew.

    \b
    Example:
      gpumesh batch retry batch_6f3a
    """
    from gpumesh.cli.batch.changes import retry_batch
    from gpumesh.cli.views.batch.sentences import describe_retry

    options = global_options(ctx)
    changed = _change_batches(options, batches, retry_batch, describe_retry, as_json=as_json)
    if any(not batch.status.has_ended for batch in changed.after):
        print_mesh_hint(options)
    changed.raise_errors()


@app.command()
def cancel(ctx: typer.Context, batches: BatchesArgument, as_json: JsonOption = False) -> None:
    """Send no more requests of a batch, and end those under way. Its results stay.

    \b
    Example:
      gpumesh batch cancel batch_6f3a
    """
    from gpumesh.cli.batch.changes import cancel_batch
    from gpumesh.cli.views.batch.sentences import describe_cancel

    _change_batches(global_options(ctx), batches, cancel_batch, describe_cancel, as_json=as_json).raise_errors()


@app.command("rm")
def remove(ctx: typer.Context, batches: BatchesArgument, as_json: JsonOption = False) -> None:
    """Remove batches that have ended, with their results and files.

    \b
    Examples:
      gpumesh batch rm batch_6f3a
      gpumesh batch rm $(gpumesh batch list -o name)
    """
    from gpumesh.cli.batch.changes import remove_batch
    from gpumesh.cli.views.batch.sentences import describe_removal

    _change_batches(global_options(ctx), batches, remove_batch, describe_removal, as_json=as_json).raise_errors()


def _change_batches(
    options: GlobalOptions,
    texts: Sequence[str],
    change: Callable[[BatchStore, Batch], Awaitable[Batch]],
    describe: Callable[[Batch, Batch], str],
    *,
    as_json: bool,
) -> Changes:
    """Changes each batch that a text names, and prints what has become of it. ``describe``: a sentence about a batch
    before and after the change. An error with one batch does not stop the others."""
    from gpumesh.batches.progress import BatchProgress
    from gpumesh.cli.batch.changes import change_batches
    from gpumesh.cli.batch.document import make_document

    async def change_all() -> Changes:
        async with open_batches(options) as store:
            return await change_batches(store, texts, change)

    changes = run_async(change_all())
    if as_json:
        print_json(make_document([BatchProgress(batch) for batch in changes.after]))
    else:
        for before, after in zip(changes.before, changes.after, strict=True):
            typer.echo(clean_line(describe(before, after)))
    return changes
