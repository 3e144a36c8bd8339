"""llama-server that starts may be silent for a limited time, which begins anew with each sign of life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gpumesh.pools.running.silence import SilenceLimit

LIMIT_S = 0.2


async def wait_and_write(said: asyncio.Event) -> AsyncIterator[str]:
    await said.wait()
    yield "model loaded"


async def test_a_load_lasts_as_long_as_weights_reach_the_workers() -> None:
    silence, said = SilenceLimit(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        line = group.create_task(silence.read_line(wait_and_write(said), LIMIT_S))
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - began < 2 * LIMIT_S:
            await asyncio.sleep(LIMIT_S / 20)
            silence.note_life()
        said.set()
    assert line.result() == "model loaded"


async def test_without_a_sign_of_life_the_wait_ends() -> None:
    silence = SilenceLimit()
    with pytest.raises(TimeoutError):
        await silence.read_line(wait_and_write(asyncio.Event()), 0.01)
    silence.note_life()  # too late, and no error
    assert await SilenceLimit().read_line(wait_and_write(_set()), None) == "model loaded"


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
