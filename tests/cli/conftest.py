from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cli.meshes import SimulatedMesh, isolated_command, quick_host, simulated_mesh
from tests.real.command import Gpumesh


@pytest.fixture
def gpumesh(tmp_path: Path) -> Iterator[Gpumesh]:
    with isolated_command(tmp_path) as made:
        yield made


@pytest.fixture
async def two(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """Two hosts behind SSH, with a GPU each, in a mesh.yaml."""
    async with simulated_mesh(gpumesh, quick_host("alpha"), quick_host("beta")) as made:
        yield made


@pytest.fixture
async def direct(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """Two servers without SSH: quicker, where neither SSH nor GPUs matter."""
    async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False), quick_host("beta", ssh=False)) as made:
        yield made
