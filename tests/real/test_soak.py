"""Load with faults: a short run of benchmarks/soak.py, which otherwise runs for hours."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nothing_is_lost_and_nothing_grows() -> None:
    arguments = ("--minutes", "0.5", "--fault-every", "4.5", "--clients", "5", "--json", "--check")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SOAK), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
    figures = json.loads(out)
    assert figures["balanced"]
    assert figures["clients"]["right"] > 50
    assert len(figures["faults"]) >= 4
