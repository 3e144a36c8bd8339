"""The running whole in this process: what ends it stands in its log."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from gpumesh.daemon.lock import MeshLock
from gpumesh.daemon.mesh_process import Shutdown, run_mesh
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.remote_session import RemoteSession
from gpumesh.errors import NoNodeError
from gpumesh.topology import BackendSpec, NodeSpec, Target, Topology
from tests.tunnels.polling import wait_until

TOPOLOGY = Topology(
    name="home", nodes=(NodeSpec("away", BackendSpec(targets=(Target("127.0.0.1", 1),)), enabled=False),)
)


def paths_in(folder: Path) -> MeshPaths:
    paths = MeshPaths(folder / "mesh.yaml", folder / "run", folder / "logs" / "home.jsonl")
    paths.create_folder()
    return paths


def lines(paths: MeshPaths) -> list[dict[str, str]]:
    return [json.loads(line) for line in paths.log.read_text().splitlines()]


async def test_a_fault_of_our_own_is_in_the_log(tmp_path: Path) -> None:
    """It goes through every context to the process's end, when the log is closed and no terminal is there."""
    paths = paths_in(tmp_path)
    with pytest.raises(ZeroDivisionError):
        async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
            raise ZeroDivisionError("the reason")
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert failed["level"] == "critical"
    assert "the reason" in failed["trace"]
    assert lines(paths)[-1] == failed


async def test_what_a_person_can_change_is_in_the_log_as_a_sentence(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    with pytest.raises(NoNodeError):
        async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
            raise NoNodeError("nobody is there")
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert failed["message"] == "the mesh ends: nobody is there"
    assert "trace" not in failed


async def test_an_end_in_order_is_no_failure_and_leaves_the_log_alone(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
        assert paths.socket.exists()
    events = [line["event"] for line in lines(paths)]
    assert events[0] == "start"
    assert "failed" not in events
    assert not paths.folder.exists()
    assert paths.log.exists()


async def test_what_lets_commands_reach_it_is_put_back(tmp_path: Path) -> None:
    """/tmp is cleared of what is old, and a runtime folder goes at logout."""
    paths = paths_in(tmp_path)
    lock = MeshLock.acquire(paths)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown(), lock=lock, check_every_s=0.01):
        shutil.rmtree(paths.folder)
        await wait_until(paths.socket.exists, "it listens again")
        await wait_until(lambda: paths.lock.exists() and paths.lock.read_text() != "", "it is locked again")
        assert (await RemoteSession(paths.socket).status()).mesh == "home"
    assert not paths.folder.exists()
    lock.release()


async def test_a_mesh_whose_place_another_has_taken_ends(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    lock, stop = MeshLock.acquire(paths), Shutdown()
    paths.lock.unlink()
    other = MeshLock.acquire(paths)
    async with (
        asyncio.timeout(20),
        run_mesh(TOPOLOGY, paths, gateway=False, shutdown=stop, lock=lock, check_every_s=0.01),
    ):
        paths.socket.unlink()
        paths.socket.touch()
        await stop.wait()
    assert paths.lock.exists()
    assert paths.socket.exists(), "they are the other's"
    other.release()
    lock.release()
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert "runs already" in failed["message"]
