from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.http_clients import loopback_client
from tests.probes.probed_servers import PATIENCE_S
from tests.probes.shell_host import ShellHost


@pytest.fixture
def host(tmp_path: Path) -> ShellHost:
    made = ShellHost(tmp_path)
    made.command("hostname", "echo af4a84245990")
    return made


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with loopback_client(timeout=PATIENCE_S) as made:
        yield made
