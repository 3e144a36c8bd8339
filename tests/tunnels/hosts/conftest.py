"""Fixtures of this room: one pool of workers and one backend for all tests of a module, which run in its event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.sshd import serving
from tests.tunnels.traffic import echo


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[WorkerPool]:
    async with WorkerPool() as pool:
        yield pool


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[int]:
    async with serving(echo) as port:
        yield port
