from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gpumesh.cli.foreground_mesh import until_stopped
from gpumesh.daemon.shutdown import Shutdown


async def test_until_stopped_ends_with_the_request() -> None:
    stop = Shutdown()
    closed = False

    async def items() -> AsyncIterator[int]:
        nonlocal closed
        try:
            yield 1
            yield 2
            await asyncio.Event().wait()
        finally:
            closed = True

    seen = []
    async for item in until_stopped(items(), stop):
        seen.append(item)
        if item == 2:
            asyncio.get_running_loop().call_soon(stop.request)
    assert seen == [1, 2]
    assert closed


async def test_until_stopped_passes_on_the_end_and_errors() -> None:
    async def few() -> AsyncIterator[int]:
        yield 1

    assert [item async for item in until_stopped(few(), Shutdown())] == [1]

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        _ = [item async for item in until_stopped(broken(), Shutdown())]
