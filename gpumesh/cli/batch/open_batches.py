"""Opens the store of batches for a command, and says whether a mesh works on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import typer

from gpumesh.cli.global_options import GlobalOptions

if TYPE_CHECKING:
    from gpumesh.batches.base import BatchStore


@asynccontextmanager
async def open_batches(options: GlobalOptions) -> AsyncGenerator[BatchStore]:
    """The store of the batches of this mesh.yaml, whether a mesh runs or not. Raises ConfigError, and BatchStoreError
    if the store cannot be used."""
    from gpumesh.batches.opening import create_batch_store

    async with create_batch_store(options.topology(), options.paths().batches) as store:
        yield store


def print_mesh_hint(options: GlobalOptions) -> None:
    """Says on stderr that nothing is sent now, if no mesh of this mesh.yaml runs here."""
    if not options.quiet and not _mesh_runs(options):
        where = " on this machine" if options.topology().redis is not None else ""
        typer.echo(f"no mesh is running{where} to work on batches: `gpumesh up -d` starts it", err=True)


def _mesh_runs(options: GlobalOptions) -> bool:
    from gpumesh.daemon.mesh_lock import LockWatch

    watch = LockWatch.open(options.paths())
    if watch is None:
        return False
    with watch:
        return watch.held
