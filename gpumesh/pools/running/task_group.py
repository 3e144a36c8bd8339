"""``error_group``: a TaskGroup whose block ends with one error, as if it had no tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from gpumesh.errors import GPUMeshError


@asynccontextmanager
async def error_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup during the block. If several of its tasks fail, the first GPUMeshError with a node is raised, else
    the first GPUMeshError; an error of another type, a bug, comes before both."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise _most_telling(list(_flatten(errors))) from errors


def _flatten(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flatten(error)
        else:
            yield error


def _most_telling(errors: list[BaseException]) -> BaseException:
    def rank(error: BaseException) -> int:
        if not isinstance(error, GPUMeshError):
            return 0
        return 1 if error.node is not None else 2

    return min(errors, key=rank)  # ``min`` returns the first of equals
