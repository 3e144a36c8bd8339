"""kill -9 of a mesh at different moments, and of its processes: nothing of it runs on, and what lies in the runtime
folder is taken away by the next mesh of the same user, which leaves all that lives alone. On a real sshd, with the
system's ssh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.topology import TransportKind
from tests.prerequisites import needs
from tests.real.command import Gpumesh, write_config
from tests.real.process_resources import workers, zygotes
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(180), needs("sshd", "ssh")]


@pytest.fixture
def gpumesh(tmp_path: Path) -> Iterator[Gpumesh]:
    home = tmp_path / "home"
    home.mkdir()
    runtime = Path(tempfile.mkdtemp(prefix="gm-", dir="/tmp"))
    made = Gpumesh(tmp_path / "mesh.yaml", home, runtime, warm=True)
    yield made
    left = made.processes()
    made.kill_all()
    shutil.rmtree(runtime, ignore_errors=True)
    assert not left, f"processes were left: {left}"


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd") as made:
        yield made


def node(sshd: Sshd, name: str, transport: TransportKind, **ssh: Any) -> dict[str, Any]:
    spec = sshd.spec()
    way = {
        "host": "127.0.0.1",
        "port": sshd.port,
        "user": spec.user,
        "identity_file": str(sshd.identity),
        "known_hosts": str(sshd.known_hosts),
        "agent": False,
        "transport": transport.value,
    }
    return {"name": name, "ssh": {**way, **ssh}, "backend": {"port": 1}}


def mesh(gpumesh: Gpumesh, name: str, *nodes: dict[str, Any]) -> Gpumesh:
    """Another mesh.yaml of the same user."""
    made = replace(gpumesh, config=gpumesh.config.with_name(f"{name}.yaml"))
    write_config(made.config, list(nodes), model="m")
    return made


def both(sshd: Sshd) -> list[dict[str, Any]]:
    return [node(sshd, f"{kind.value}-{place}", kind) for kind in TransportKind for place in (1, 2)]


def folders(gpumesh: Gpumesh) -> set[Path]:
    """Those of connections and those of meshes."""
    place = gpumesh.runtime / "gpumesh"
    return set(place.iterdir()) if place.exists() else set()


async def up(gpumesh: Gpumesh) -> None:
    async with asyncio.timeout(40):
        while True:
            ended = await gpumesh("status", "--json", code=None)
            if {one["tunnel"]["state"] for one in ended.json()["nodes"]} == {"up"}:
                return
            await asyncio.sleep(0.1)


async def kill(gpumesh: Gpumesh, pid: int, *, but: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """It, and waits for all that ended with it; ``but`` are another's."""
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not {one for one in gpumesh.processes() if alive(one)} - but, "all of it has ended")


async def test_the_next_mesh_takes_away_what_a_killed_one_left_and_no_more(gpumesh: Gpumesh, sshd: Sshd) -> None:
    second = mesh(gpumesh, "second", *both(sshd))
    await second("up", "-d", code=4)  # no server runs there
    await up(second)
    seconds, its_folders = second.processes(), folders(gpumesh)
    first = mesh(gpumesh, "first", *both(sshd))
    await first("up", "-d", code=4)  # no server runs there
    await up(first)
    (leader,) = [pid for pid in first.processes() - seconds if _is_daemon(pid, first)]
    await kill(first, leader, but=seconds)
    left = folders(gpumesh) - its_folders
    assert len(left) >= 3, f"two of connections and its own: {left}"
    third = mesh(gpumesh, "third", node(sshd, "a", TransportKind.OPENSSH))
    await third("up", "-d", code=4)  # no server runs there
    assert not left & folders(gpumesh)
    assert its_folders <= folders(gpumesh)
    state = (await second("status", "--json")).json()
    assert [one["tunnel"]["reconnects"] for one in state["nodes"]] == [0] * 4
    for one in state["nodes"]:
        assert (await second("exec", one["name"], "--", "echo", "well")).out
    assert seconds <= second.processes()
    await third("down")
    await second("down")
    assert folders(gpumesh) == set()


def _is_daemon(pid: int, gpumesh: Gpumesh) -> bool:
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"gpumesh.daemon" in arguments and str(gpumesh.config).encode() in arguments
    return False


@pytest.mark.parametrize("command", [["up", "-d"], ["status"], ["exec", "a", "--", "true"]], ids=lambda it: it[0])
async def test_killed_while_it_connects(gpumesh: Gpumesh, sshd: Sshd, command: list[str]) -> None:
    """To a host that never says a word, with a password to ask for: ssh runs, and somebody listens for its question."""
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        port = silent.getsockname()[1]
        way = node(sshd, "a", TransportKind.OPENSSH, port=port, password_env="USER", connect_timeout="60s")
        killed = mesh(gpumesh, "killed", way)
        async with killed.started("up") as process:
            await wait_until(lambda: any(path.name == "ask" for path in gpumesh.sockets()), "it connects")
            await kill(killed, process.pid)
            await process.wait()
        assert folders(gpumesh)
    well = mesh(gpumesh, "well", node(sshd, "a", TransportKind.OPENSSH))
    left = folders(gpumesh)
    await well(*command, code=None)
    assert not left & folders(gpumesh)
    if command[0] == "up":
        await well("down")
    assert folders(gpumesh) == set()


async def test_killed_while_it_drains(gpumesh: Gpumesh, sshd: Sshd) -> None:
    killed = mesh(gpumesh, "killed", *both(sshd))
    await killed("up", "-d", code=4)  # no server runs there
    await up(killed)
    leader = killed.leader()
    os.kill(leader, signal.SIGSTOP)
    os.kill(leader, signal.SIGTERM)
    await kill(killed, leader)
    assert folders(gpumesh)
    ended = await killed("down", code=None)
    assert "ended without stopping (killed or crashed)" in ended.err
    assert folders(gpumesh) == set(), "down sweeps too"


async def test_its_processes_killed_leave_nothing(gpumesh: Gpumesh, sshd: Sshd) -> None:
    """The mesh lives, and clears up behind them by itself."""
    running = mesh(gpumesh, "running", *both(sshd))
    await running("up", "-d", code=4)  # no server runs there
    await up(running)
    leader = running.leader()
    for find in (workers, zygotes):
        await anew(running, find(leader))
    await running("down")
    assert folders(gpumesh) == set()


async def anew(gpumesh: Gpumesh, pids: list[int]) -> None:
    """Kills them, and waits until the mesh has new connections and no more of the old ones."""
    before = folders(gpumesh)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: len(folders(gpumesh) - before) == 2, "new connections have new folders")
    await wait_until(lambda: len(folders(gpumesh)) == 3, "the old ones are gone")
    await up(gpumesh)
