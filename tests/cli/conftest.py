from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cli.meshes import Simulated, command, quick, simulated
from tests.real.command import Gpumesh


@pytest.fixture
def gpumesh(tmp_path: Path) -> Iterator[Gpumesh]:
    with command(tmp_path) as made:
        yield made


@pytest.fixture
async def two(gpumesh: Gpumesh) -> AsyncIterator[Simulated]:
    """Two hosts behind SSH, with a GPU each, in a mesh.yaml."""
    async with simulated(gpumesh, quick("alpha"), quick("beta")) as made:
        yield made


@pytest.fixture
async def direct(gpumesh: Gpumesh) -> AsyncIterator[Simulated]:
    """Two servers without SSH: quicker, where neither SSH nor GPUs matter."""
    async with simulated(gpumesh, quick("alpha", ssh=False), quick("beta", ssh=False)) as made:
        yield made
