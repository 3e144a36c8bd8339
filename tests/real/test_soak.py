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
    # At half the pace a second of this costs half of the CPU time. Each fault still meets answers that have begun.
    run = ("--minutes", "0.35", "--warm-up", "3", "--fault-every", "3.5", "--clients", "5", "--pace", "0.4")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SOAK),
        *run,
        "--json",
        "--check",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
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
