"""Opens the store of batches for a command."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

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
