"""Closing what a protocol calls an AsyncIterator and is an async generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def closing_iterator(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """As ``contextlib.aclosing``, for iterators whose type promises no ``aclose``: what they began ends here, not when
    the garbage is collected."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
