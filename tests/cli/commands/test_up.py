"""`up` and `down`: in the background, in the foreground with and without a terminal, twice, and with what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys

import pytest

from gpumesh import config
from gpumesh.cli.foreground_mesh import show_mesh
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.lab.profile import Faults
from gpumesh.mesh.mesh import Mesh
from tests.cli.meshes import MODEL, SimulatedMesh, quick_host, simulated_mesh
from tests.http_clients import loopback_client
from tests.real.command import GPUMESH, Gpumesh
from tests.real.terminal import run_on_terminal
from tests.tunnels import polling

slow = pytest.mark.slow


@slow
async def test_in_the_background(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    up = await gpumesh("up", "-d")
    assert "2 of 2 nodes up" in up.out
    assert "runs in the background (pid " in up.err
    assert "`gpumesh down` stops it" in up.err
    (pid,) = gpumesh.processes()
    assert f"pid {pid}" in up.err
    again = await gpumesh("up", "-d", code=1)
    assert f"runs already (pid {pid})" in again.err
    assert "`gpumesh status` shows it" in again.err
    assert f"runs already (pid {pid})" in (await gpumesh("up", code=1)).err
    down = await gpumesh("down")
    assert (down.out, down.err) == ("", "stopped\n")
    assert gpumesh.processes() == set()
    assert gpumesh.sockets() == []
    ended = await gpumesh("down")
    assert ended.err == "no mesh is running for this configuration\n"
    quiet = await gpumesh("up", "-d", "-q")
    assert (quiet.out, quiet.err) == ("", "")
    quiet = await gpumesh("down", "-q")
    assert (quiet.out, quiet.err) == ("", "")


# The command, but it waits longer for the report: on a busy machine Ctrl-C may come late.
PATIENT_COMMAND = """
import sys
from gpumesh.cli import first_report
first_report.FIRST_REPORT_TIMEOUT_S = 60.0
from gpumesh.cli.main import main
sys.argv[0] = "gpumesh"
main()
"""


@slow
async def test_who_does_not_wait_for_the_report_knows_that_it_runs(two: SimulatedMesh) -> None:
    """A host that hangs holds the report up; Ctrl-C ends the waiting, not the mesh."""
    await two.hosts["alpha"].set_faults(Faults(ssh_hang=True))
    two.write([two.node(name, ssh={**two.node(name)["ssh"], "connect_timeout": "60s"}) for name in two.hosts])
    command = (sys.executable, "-c", PATIENT_COMMAND, "up", "-d")
    async with run_on_terminal(command, env=two.gpumesh.environment(), cwd=two.gpumesh.home) as shown:
        await shown.wait_for_text("`gpumesh down` stops it")
        assert re.search(
            r"runs in the background \(pid \d+\), serving http://127\.0\.0\.1:\d+ \(page: /ui\);", shown.plain_text
        )
        assert "nodes up" not in shown.plain_text
        shown.press("\x03")
        assert await shown.wait_exit() == 130
    assert (await two.gpumesh("down")).err == "stopped\n"


@slow
async def test_only_some_nodes_another_address_and_no_gateway(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d", "beta", "--listen", "127.0.0.1:0")
    state = (await gpumesh("status", "--json")).json()
    assert [node["name"] for node in state["nodes"]] == ["beta"]
    async with loopback_client() as client:
        assert (await client.get(state["gateway"]["url"])).text == "Ollama is running"
    await gpumesh("down")
    await gpumesh("up", "-d", "--no-gateway")
    state = (await gpumesh("status", "--json")).json()
    assert state["gateway"]["url"] is None
    assert state["gateway"]["state"] == "off"
    await gpumesh("down")


@slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gamma"], 2, "there is no node 'gamma'"),
        (["--listen", "nonsense"], 2, "is not HOST:PORT"),
        (["--listen", "0.0.0.0:0"], 2, "lets other machines use your GPUs"),
        (["--listen", "127.0.0.1:{taken}"], 1, "cannot listen on"),
    ],
)
@pytest.mark.parametrize("how", [["-d"], []])
async def test_what_cannot_be_is_said_and_leaves_nothing(
    direct: SimulatedMesh, arguments: list[str], code: int, said: str, how: list[str]
) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        taken = server.sockets[0].getsockname()[1]
        words = [word.format(taken=taken) for word in arguments]
        ended = await direct.gpumesh("up", *how, *words, code=code)
    assert said in ended.err
    assert ended.err.count("error:") == 1
    assert direct.gpumesh.processes() == set()
    assert direct.gpumesh.sockets() == []


@slow
async def test_in_the_foreground_on_a_terminal(direct: SimulatedMesh) -> None:
    for way in ("q", "\x03"):
        async with direct.gpumesh.terminal("up") as shown:
            await shown.wait_for_text("2 of 2 nodes up")
            assert shown.modes() != shown.modes_before
            await direct.gpumesh("run", "x", "-o", "num_predict=2")
            shown.press(way)
            if way == "q":
                place = await shown.wait_for_text("stop the mesh? y/n")
                shown.press("n")
                place = await shown.wait_for_text("q quit", after=place)
                shown.press("q")
                await shown.wait_for_text("stop the mesh? y/n", after=place)
                shown.press("y")
            assert await shown.wait_exit() == 0
            assert shown.is_restored()
            assert "closing" in shown.plain_text
        assert direct.gpumesh.sockets() == []


async def test_what_stands_below_the_table_is_said_where_there_is_none(
    direct: SimulatedMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Shutdown()
    stop.request()
    async with Mesh(config.load(direct.gpumesh.config)) as mesh:
        await show_mesh(LocalSession(mesh), stop, GlobalOptions(quiet=True), notes=("", "in another terminal:"))
    assert capsys.readouterr().out == "\nin another terminal:\n"


@slow
async def test_in_the_foreground_without_a_terminal(direct: SimulatedMesh) -> None:
    """The first report, then a line for each change; SIGTERM ends it in order."""
    async with direct.gpumesh.started("up") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(30):
            seen = b""
            while b"nodes up" not in seen:
                seen += await process.stdout.readline()
            await direct.hosts["beta"].set_faults(Faults(refuse=True))
            told = b""
            while b"-> down" not in told:
                told += await process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    assert b"beta" in told
    assert b"\x1b" not in seen + told


@slow
async def test_a_terminal_that_is_closed_cuts_nothing(gpumesh: Gpumesh) -> None:
    """The window is shut: SIGHUP, and whatever is written to it from then on fails."""
    host = quick_host("slow", ssh=False, tokens_per_s=20.0, answer_tokens=(40, 40))
    async with simulated_mesh(gpumesh, host):
        controller, its_end = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *("setsid", "-c", "-w", str(GPUMESH), "up"),
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
            env=gpumesh.environment(),
        )
        os.close(its_end)
        shown = b""
        while b"1 of 1 node up" not in shown:
            shown += await asyncio.to_thread(os.read, controller, 65536)
        url = (await gpumesh("status", "--json")).json()["gateway"]["url"]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        async with (
            loopback_client(timeout=30) as client,
            client.stream("POST", f"{url}/api/chat", json=body) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            os.close(controller)
            last = json.loads([line async for line in lines][-1])
        assert last["done"]
        assert last["eval_count"] == 40
        async with asyncio.timeout(30):
            await process.wait()
        assert gpumesh.sockets() == []
        assert '"failed"' not in gpumesh.logs(), "that is no fault"


@slow
@pytest.mark.parametrize("way", ["down", "SIGTERM"])
async def test_what_is_in_flight_may_end(gpumesh: Gpumesh, way: str) -> None:
    host = quick_host("slow", ssh=False, tokens_per_s=10.0, answer_tokens=(45, 45))
    async with simulated_mesh(gpumesh, host):
        await gpumesh("up", "-d")
        (pid,) = gpumesh.processes()
        async with gpumesh.started("run", "x", "--json") as asking:
            assert asking.stdout is not None
            await until_in_flight(gpumesh)
            if way == "down":
                ended = await gpumesh("down")
                assert "waiting for 1 request to end" in ended.err
            else:
                os.kill(pid, signal.SIGTERM)
            async with asyncio.timeout(20):
                result = json.loads(await asking.stdout.read())
            assert (result["error"], result["tokens"]) == (None, 45)
            await gone({pid})


@slow
async def test_what_takes_longer_is_cut(gpumesh: Gpumesh) -> None:
    host = quick_host("slow", ssh=False, tokens_per_s=5.0, answer_tokens=(9000, 9000))
    async with simulated_mesh(gpumesh, host) as made:
        await gpumesh("up", "-d")
        async with gpumesh.started("run", "x") as asking:
            await until_in_flight(gpumesh)
            ended = await gpumesh("down", "--wait", "0.5")
            assert ended.wall_s < 15
            async with asyncio.timeout(20):
                assert await asking.wait() == 1
            assert asking.stderr is not None
            assert b"error: " in await asking.stderr.read()
        await polling.wait_until(lambda: not made.hosts["slow"].counters.in_flight, "the generation has stopped")


async def until_in_flight(gpumesh: Gpumesh) -> None:
    async with asyncio.timeout(20):
        while not (await gpumesh("status", "--json")).json()["gateway"]["in_flight"]:
            await asyncio.sleep(0.05)


async def gone(pids: set[int]) -> None:
    await polling.wait_until(lambda: not any(map(polling.alive, pids)), "the processes have ended")


async def killed(gpumesh: Gpumesh) -> None:
    pids = gpumesh.processes()
    gpumesh.kill_all()
    await gone(pids)


@slow
async def test_a_mesh_that_was_killed_is_no_obstacle(direct: SimulatedMesh) -> None:
    gpumesh = direct.gpumesh
    await gpumesh("up", "-d")
    await killed(gpumesh)
    assert gpumesh.sockets() != []
    assert "2 of 2 nodes up" in (await gpumesh("status")).out, "it looks for itself"
    assert "ended without stopping (killed or crashed)" in (await gpumesh("down")).err
    assert gpumesh.sockets() == []
    await gpumesh("up", "-d")
    await killed(gpumesh)
    await gpumesh("up", "-d")
    assert (await gpumesh("run", "x", "-m", MODEL, "-o", "num_predict=1")).out.strip()
    await gpumesh("down")
