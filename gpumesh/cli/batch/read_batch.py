"""Reads one batch for a command: its progress or its results, now or until it has ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import typer

from gpumesh.batches.progress import BatchProgress
from gpumesh.batches.values import Batch
from gpumesh.cli.batch.find_batch import find_batch
from gpumesh.cli.batch.follow import (
    CopiedResults,
    PatientReader,
    add_errors,
    copy_results,
    follow_progress,
    follow_results,
    measure_with_wait,
)
from gpumesh.cli.batch.mesh_hints import print_mesh_hint
from gpumesh.cli.batch.open_batches import open_batches
from gpumesh.cli.batch.result_output import open_result_output
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.views.batch.watch_display import show_watch
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.async_iterators import closing_iterator


async def read_progress(options: GlobalOptions, text: str | None, *, watch: bool) -> BatchProgress:
    """The batch now, and why it is so; with ``watch`` at its end, until when its progress is shown. Raises
    BatchError."""
    async with open_batches(options) as store:
        found = await find_batch(store, text)
        progress = await measure_with_wait(store, found)
        if watch and not found.status.has_ended:
            print_mesh_hint(options)
            reader = PatientReader(_print_store_away(options))
            with show_watch(quiet=options.quiet) as display:
                async with closing_iterator(follow_progress(store, found.id, reader)) as states:
                    async for progress in states:
                        display(progress)
            return await reader.read(partial(add_errors, store, progress))
        return await add_errors(store, progress)


async def write_results(
    options: GlobalOptions, text: str | None, out: str | None, *, follow: bool, only_failed: bool, force: bool
) -> tuple[Batch, CopiedResults]:
    """Writes the results. Returns the batch as it is afterwards, and how many results were written. Raises BatchError,
    UsageError as ``open_result_output`` does, and OSError."""
    async with open_batches(options) as store:
        found = await find_batch(store, text)
        if follow and not found.status.has_ended:
            print_mesh_hint(options)
        with open_result_output(out, force=force, grows=follow) as write:
            if follow:
                reader = PatientReader(_print_store_away(options))
                copied = await follow_results(store, found, write, reader, only_failed=only_failed)
            else:
                copied = await copy_results(store, found, write, only_failed=only_failed)
        return await store.get_batch(found.id), copied


def _print_store_away(options: GlobalOptions) -> Callable[[GPUMeshError], None]:
    """A function that says on stderr that the store is waited for."""

    def print_error(error: GPUMeshError) -> None:
        if not options.quiet:
            typer.echo(clean_line(f"{error.message.rstrip('.')}; waiting for it"), err=True)

    return print_error
