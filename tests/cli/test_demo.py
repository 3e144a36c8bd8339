"""`gpumesh demo` tells its story to its end: with real processes as hosts, one of which is killed."""

from __future__ import annotations

import asyncio
import re
import signal

import pytest

from tests.cli.terminals import terminal
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LIMIT_S = 120  # the demo itself says that it takes less than a minute; the machine may be busy


async def test_into_a_pipe(gpumesh: Gpumesh) -> None:
    async with gpumesh.started("demo") as process:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    text = out.decode()
    assert process.returncode == 0, text
    assert err == b""
    assert "\x1b" not in text
    assert "their SSH is real, their GPUs are not" in text
    assert re.search(r"24 of 24 answered in [0-9.]+ s, 0 lost, \d+ moved away from \w+", text), text
    assert re.search(r"✗ \w+ is dead", text)
    assert "What to try next" in text
    assert text.count("nodes up ·") >= 2, "the table, before and after"
    assert gpumesh.sockets() == []


async def test_on_a_terminal_the_table_lives(gpumesh: Gpumesh) -> None:
    async with terminal(gpumesh, "demo", "--nodes", "2", columns=100, rows=30) as shown:
        async with asyncio.timeout(LIMIT_S):
            assert await shown.process.wait() == 0
        await shown.until("What to try next")
        assert shown.modes() == shown.modes_before
        assert "\x1b[?25h" in shown.written, "the cursor is back"
        assert "24 of 24 answered" in shown.said


async def test_keep_stays_to_be_played_with_until_ctrl_c(gpumesh: Gpumesh) -> None:
    async with gpumesh.started("demo", "--nodes", "2", "--keep") as process:
        assert process.stdout is not None
        seen = b""
        async with asyncio.timeout(LIMIT_S):
            while b"It stays up until Ctrl-C" not in seen:
                line = await process.stdout.readline()
                assert line, seen
                seen += line
            while b"GPUMESH_CONFIG=" not in seen.rpartition(b"\n")[0]:
                seen += await process.stdout.readline()
        config = re.search(rb"export GPUMESH_CONFIG=(\S+)", seen)
        assert config is not None
        other = ("-c", config[1].decode())
        assert "nodes up" in (await gpumesh("status", *other)).out
        assert (await gpumesh("run", *other, "Hello", "-o", "num_predict=3")).out.strip()
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(LIMIT_S):
            await process.stdout.read()
            assert await process.wait() == 0


@pytest.mark.parametrize("count", ["1", "9", "many"])
async def test_how_many_hosts(gpumesh: Gpumesh, count: str) -> None:
    ended = await gpumesh("demo", "--nodes", count, code=2)
    assert "--nodes" in ended.err
