"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.fleet import RunningGateway, serve_hosts


@pytest.fixture
async def fleet() -> AsyncIterator[RunningGateway]:
    """A gateway over two hosts, A and B."""
    async with serve_hosts() as running:
        yield running
