"""Fixtures for tests of batches: a store of each kind, opened twice, as by two processes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpumesh.batches.base import BatchStore
from tests.batches.stores import (
    StorePlace,
)
from tests.prerequisites import needs
from tests.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=[pytest.mark.real, needs("redis-server")])])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    redis = request.getfixturevalue("redis_server") if request.param == "redis" else None
    return StorePlace(tmp_path / f"batches-{secrets.token_hex(4)}", redis)


@pytest.fixture
async def store(place: StorePlace) -> AsyncIterator[BatchStore]:
    async with place.open() as opened:
        yield opened


@pytest.fixture
async def other(place: StorePlace, store: BatchStore) -> AsyncIterator[BatchStore]:
    async with place.open() as opened:
        yield opened
