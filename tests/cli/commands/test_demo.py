"""`gpumesh demo` tells its story to its end: with real processes as hosts, one of which is killed."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.real.command import Gpumesh
from tests.real.terminal import ENTER_SCREEN
from tests.tunnels.polling import wait_until

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
    async with gpumesh.terminal("demo", "--nodes", "2", columns=100, rows=30) as shown:
        async with asyncio.timeout(LIMIT_S):
            assert await shown.process.wait() == 0
        await shown.wait_for_text("What to try next")
        assert shown.modes() == shown.modes_before
        assert "\x1b[?25h" in shown.written, "the cursor is back"
        assert "24 of 24 answered" in shown.plain_text


async def test_keep_stays_to_be_played_with_until_ctrl_c(gpumesh: Gpumesh) -> None:
    async with gpumesh.terminal("demo", "--nodes", "2", "--keep", columns=80, rows=24) as shown:
        for step in ("is dead", "24 of 24 answered", "was started again"):
            await shown.wait_for_text(step)
        await wait_until(lambda: ENTER_SCREEN in shown.written, "the live table")
        # How to get at it stands where it can be read: under the table, which has the screen to itself.
        there = len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.written.partition(ENTER_SCREEN)[0]))
        await shown.wait_for_text("ollama run", after=there)
        config = re.search(r"export GPUMESH_CONFIG=(\S+?mesh\.yaml)", shown.plain_text[there:])
        assert config is not None
        other = ("-c", config[1])
        assert "nodes up" in (await gpumesh("status", *other)).out
        assert (await gpumesh("run", *other, "Hello", "-o", "num_predict=3")).out.strip()
        shown.press("\x03")
        assert await shown.wait_exit() == 0
        assert shown.is_restored()
        assert "export" not in shown.plain_text[shown.plain_text.rindex("nodes up") :], "it is there no more"


@pytest.mark.parametrize("count", ["1", "9", "many"])
async def test_how_many_hosts(gpumesh: Gpumesh, count: str) -> None:
    ended = await gpumesh("demo", "--nodes", count, code=2)
    assert "--nodes" in ended.err
