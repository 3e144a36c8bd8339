"""Closes an async generator at the end of a block, even if its type says only that it is an AsyncIterator."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def closing_iterator(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Yields ``items``, and closes it at the end of the block if it is an async generator. Unlike
    ``contextlib.aclosing``, accepts an iterator whose type promises no ``aclose``.

    Closing a generator ends its work at once. Otherwise the work would go on until the garbage is collected. An
    iterator that is no generator has nothing to close.
    """
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
