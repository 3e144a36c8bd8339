"""The whole mesh in this process: its log names what ended it, and its files are restored."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from gpumesh.daemon.control_socket.remote_session import RemoteSession
from gpumesh.daemon.mesh_lock import MeshLock
from gpumesh.daemon.mesh_process import run_mesh
from gpumesh.daemon.paths import MeshPaths
from gpumesh.daemon.shutdown import Shutdown
from gpumesh.errors import NoNodeError
from gpumesh.lab.ollama import SimOllama
from gpumesh.topology import BackendSpec, NodeSpec, Target, Topology
from tests.mesh.meshes import MODEL, host, node
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


async def test_a_bug_that_ends_the_mesh_is_in_its_log(tmp_path: Path) -> None:
    """The error leaves the process after the log is closed, and a background mesh has no terminal."""
    paths = paths_in(tmp_path)
    with pytest.raises(ZeroDivisionError):
        async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
            raise ZeroDivisionError("the reason")
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert failed["level"] == "critical"
    assert "the reason" in failed["trace"]
    assert lines(paths)[-1] == failed


async def test_an_expected_error_is_in_the_log_without_a_trace(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    with pytest.raises(NoNodeError):
        async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
            raise NoNodeError("nobody is there")
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert failed["message"] == "the mesh ends: nobody is there"
    assert "trace" not in failed


async def test_a_normal_end_removes_the_folder_and_keeps_the_log(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown()):
        assert paths.socket.exists()
    events = [line["event"] for line in lines(paths)]
    assert events[0] == "start"
    assert "failed" not in events
    assert not paths.folder.exists()
    assert paths.log.exists()


async def test_removed_socket_and_lock_are_restored(tmp_path: Path) -> None:
    """A system clears old files from /tmp, and removes a runtime folder at logout."""
    paths = paths_in(tmp_path)
    lock = MeshLock.acquire(paths)
    async with run_mesh(TOPOLOGY, paths, gateway=False, shutdown=Shutdown(), lock=lock, restore_interval_s=0.01):
        shutil.rmtree(paths.folder)
        await wait_until(paths.socket.exists, "the control socket is back")
        await wait_until(lambda: paths.lock.exists() and paths.lock.read_text() != "", "the lock is back")
        assert (await RemoteSession(paths.socket).status()).mesh == "home"
    assert not paths.folder.exists()
    lock.release()


async def test_a_mesh_ends_when_another_mesh_has_its_lock(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    lock, stop = MeshLock.acquire(paths), Shutdown()
    paths.lock.unlink()
    other = MeshLock.acquire(paths)
    async with (
        asyncio.timeout(20),
        run_mesh(TOPOLOGY, paths, gateway=False, shutdown=stop, lock=lock, restore_interval_s=0.01),
    ):
        paths.socket.unlink()
        paths.socket.touch()
        await stop.wait()
    assert paths.lock.exists()
    assert paths.socket.exists(), "they belong to the other mesh"
    other.release()
    lock.release()
    (failed,) = [line for line in lines(paths) if line["event"] == "failed"]
    assert "runs already" in failed["message"]


async def test_what_was_learned_is_kept_beside_the_logs_of_all_meshes(tmp_path: Path) -> None:
    """The tests use a folder of their own, so they do not touch the user's."""
    paths = paths_in(tmp_path)
    assert paths.learned == tmp_path / "learned.json"
    async with SimOllama(host("a")) as server:
        topology = Topology("home", (node("a", server.url),))
        async with run_mesh(topology, paths, gateway=False, shutdown=Shutdown()) as session:
            await session.mesh.wait_usable(MODEL, timeout_s=10.0)
            async with session.mesh.chat(MODEL, "Why?") as stream:
                assert [chunk async for chunk in stream]
    assert paths.learned.exists()
