"""A tunnel that breaks again and again leaves nothing behind. benchmarks/cycles.py runs hundreds of cycles, and checks
the memory as well."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpumesh.topology import TransportKind
from tests.prerequisites import needs
from tests.real.cycles import run_cycles

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    needs("sshd", "ssh"),
]


@pytest.mark.parametrize("transport", TransportKind)
async def test_killed_and_recovered_ten_times(tmp_path: Path, runtime: Path, transport: TransportKind) -> None:
    result = await run_cycles(tmp_path, runtime, transport, cycles=10, warm_up=3, progress=lambda _: None)
    assert result.reconnects == 10
    assert len(result.ports) == 1, "the local port stays"
    assert result.after.mesh.countable == result.before.mesh.countable
    assert result.after.zygote.countable == result.before.zygote.countable
    assert result.leftover_files == ()
