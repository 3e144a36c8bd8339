"""A gateway with short bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.fleet import A, RunningGateway, serve_hosts
from tests.gateway.http.raw_clients import SHORT


@pytest.fixture
async def short() -> AsyncIterator[RunningGateway]:
    async with serve_hosts(A, bounds=SHORT) as fleet:
        yield fleet
