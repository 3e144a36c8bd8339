"""What keys mean (pure), and the live table on a real terminal: drawn, driven, and put away again on every way out."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gpumesh.cli.views.live.live_table import LiveTable
from gpumesh.cli.views.node_selection import ViewSelection
from tests.cli.meshes import SimulatedMesh
from tests.daemon.scripted import ScriptedSession
from tests.real.terminal import Terminal
from tests.tunnels.polling import wait_until

# -- on a terminal ---------------------------------------------------------------------------------------------------

slow = pytest.mark.slow


async def drawn(table: Terminal) -> None:
    await table.wait_for_text("2 of 2 nodes up")


@slow
async def test_keys_drain_resume_reconnect_sort_and_quit(two: SimulatedMesh) -> None:
    await two.gpumesh("up", "-d")
    async with two.gpumesh.terminal("status", "-w", "--interval", "0.2") as table:
        await drawn(table)
        assert table.modes() != table.modes_before
        place = await table.wait_for_text("q quit")
        table.press("\x1b[B\x1b[B")
        table.press("d")
        place = await table.wait_for_text("‖ beta", after=place)
        table.press("r")
        place = await table.wait_for_text("● beta", after=place)
        table.press("c")
        place = await table.wait_for_text("reconnect beta", after=place)
        table.press("s")
        place = await table.wait_for_text("sorted by config", after=place)
        table.press("v")
        await table.wait_for_text("no process is seen", after=place)
        table.press("q")
        assert await table.wait_exit() == 0
        assert table.is_restored()
        assert "\x1b[2J" not in table.written.split("q quit", 1)[1], "it never erases the screen while it runs"
    await two.gpumesh("down")


@slow
@pytest.mark.parametrize("way", ["ctrl-c", "SIGTERM", "SIGHUP", "mesh ends", "a node that is not there"])
async def test_the_terminal_is_restored_on_every_way_out(direct: SimulatedMesh, way: str) -> None:
    await direct.gpumesh("up", "-d")
    arguments = ("-n", "nobody") if way.startswith("a node") else ()
    async with direct.gpumesh.terminal("status", "-w", *arguments) as table:
        if not arguments:
            await drawn(table)
            assert table.modes() != table.modes_before
        if way == "ctrl-c":
            table.press("\x03")
        elif way.startswith("SIG"):
            table.process.send_signal(signal.Signals[way])
        elif way == "mesh ends":
            await direct.gpumesh("down")
        expected = {"ctrl-c": 130, "SIGTERM": -15, "SIGHUP": -1, "mesh ends": 1}.get(way, 2)
        assert await table.wait_exit() == expected
        assert table.is_restored(), way
        assert "Traceback" not in table.written
        if way == "mesh ends":
            assert "error: the running mesh ended" in table.plain_text
        if arguments:
            assert "there is no node 'nobody'" in table.plain_text
    if way != "mesh ends":
        await direct.gpumesh("down")


@slow
async def test_ctrl_z_restores_the_terminal_and_fg_redraws(direct: SimulatedMesh) -> None:
    async with direct.gpumesh.terminal("status", "-w") as table:
        await drawn(table)
        os.kill(table.process.pid, signal.SIGTSTP)
        await wait_until(lambda: state_of(table.process.pid) == "T", "it is stopped")
        await wait_until(table.is_restored, "the terminal is given back")
        place = len(table.plain_text)
        table.process.send_signal(signal.SIGCONT)
        await table.wait_for_text("2 of 2 nodes up", after=place)
        assert table.modes() != table.modes_before
        table.press("q")
        assert await table.wait_exit() == 0
        assert table.is_restored()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@slow
async def test_a_resized_terminal_is_redrawn(direct: SimulatedMesh) -> None:
    async with direct.gpumesh.terminal("status", "-w", columns=200) as table:
        await drawn(table)
        assert "BACKEND" in table.plain_text
        place = len(table.plain_text)
        table.resize(60, 12)
        await table.wait_for_text("2 of 2 nodes up", after=place)
        assert "BACKEND" not in table.plain_text[place:]
        table.press("q")
        assert await table.wait_exit() == 0


@slow
async def test_on_a_dumb_terminal_it_only_prints(direct: SimulatedMesh) -> None:
    async with direct.gpumesh.terminal("status", "-w", "--interval", "0.1", TERM="dumb") as table:
        await table.wait_for_text("nodes up", after=await table.wait_for_text("nodes up"))
        assert "\x1b" not in table.written
        table.press("\x03")
        assert await table.wait_exit() == 130


async def test_repr_shows_the_state() -> None:
    table = LiveTable(ScriptedSession(), ViewSelection(), footer="Ctrl-C leaves")
    assert repr(table) == "<LiveTable WAITING 0 nodes selected ''>"
