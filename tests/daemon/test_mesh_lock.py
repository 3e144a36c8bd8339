from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.daemon.mesh_lock import LockWatch, MeshLock
from gpumesh.daemon.paths import MeshPaths
from gpumesh.errors import GPUMeshError, MeshAlreadyRunning


@pytest.fixture
def paths(tmp_path: Path) -> MeshPaths:
    return MeshPaths(tmp_path / "mesh.yaml", tmp_path / "run" / "0123", tmp_path / "log" / "0123.jsonl")


def holder(paths: MeshPaths) -> subprocess.Popen[bytes]:
    """Another process that holds the lock until its stdin ends."""
    code = (
        "import sys; from pathlib import Path; from gpumesh.daemon.mesh_lock import MeshLock;"
        " from gpumesh.daemon.paths import MeshPaths;"
        " lock = MeshLock.acquire(MeshPaths(*map(Path, sys.argv[1:]))); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(paths.config), str(paths.folder), str(paths.log)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=20)


def test_the_folder_is_private(paths: MeshPaths) -> None:
    lock = MeshLock.acquire(paths)
    assert stat.S_IMODE(paths.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(paths.lock.stat().st_mode) == 0o600
    lock.release()


def test_only_one_process_holds_the_lock_and_others_learn_its_pid(paths: MeshPaths) -> None:
    process = holder(paths)
    try:
        with pytest.raises(MeshAlreadyRunning, match=rf"pid {process.pid}"):
            MeshLock.acquire(paths)
        with LockWatch.open(paths) or pytest.fail("no lock file") as watch:
            assert watch.held
            assert watch.pid == process.pid
            assert not watch.remove_if_stale(paths)
            assert paths.lock.exists()
    finally:
        end(process)


def test_the_files_of_a_killed_process_are_removed(paths: MeshPaths) -> None:
    process = holder(paths)
    paths.socket.touch()
    end(process)
    with LockWatch.open(paths) or pytest.fail("no lock file") as watch:
        assert not watch.held
        assert watch.remove_if_stale(paths)
    assert not paths.folder.exists()
    assert LockWatch.open(paths) is None


def test_a_stale_lock_file_is_taken_over(paths: MeshPaths) -> None:
    end(holder(paths))
    lock = MeshLock.acquire(paths)
    assert paths.lock.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_late_removal_of_stale_files_spares_a_newer_mesh(paths: MeshPaths) -> None:
    end(holder(paths))
    with LockWatch.open(paths) or pytest.fail("no lock file") as watch:
        paths.remove_files()
        lock = MeshLock.acquire(paths)
        assert watch.remove_if_stale(paths)
        assert paths.lock.exists()
        lock.release()


def test_the_lock_is_held_until_the_process_ends(paths: MeshPaths) -> None:
    process = holder(paths)
    with LockWatch.open(paths) or pytest.fail("no lock file") as watch:
        paths.remove_files()
        assert watch.held
        end(process)
        assert not watch.held


def test_a_socket_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "mesh.yaml", tmp_path / ("x" * 100), tmp_path / "log")
    with pytest.raises(GPUMeshError, match="longer than a Unix socket"):
        MeshLock.acquire(paths)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(GPUMeshError, match="cannot use the runtime folder"):
        MeshLock.acquire(MeshPaths(tmp_path / "mesh.yaml", tmp_path / "run" / "0123", tmp_path / "log"))


def test_a_removed_lock_file_is_restored(paths: MeshPaths) -> None:
    lock = MeshLock.acquire(paths)
    os.utime(paths.lock, (1, 1))
    lock.restore_file(paths)
    assert paths.lock.stat().st_mtime > 1, "what is old is cleared out of /tmp"
    paths.lock.unlink()
    paths.folder.rmdir()
    lock.restore_file(paths)
    with LockWatch.open(paths) or pytest.fail("no lock file") as watch:
        assert watch.held
        assert watch.pid == os.getpid()
    lock.release()


def test_a_lock_that_another_mesh_has_taken_is_not_restored(paths: MeshPaths) -> None:
    lock = MeshLock.acquire(paths)
    paths.lock.unlink()
    process = holder(paths)
    try:
        with pytest.raises(MeshAlreadyRunning, match=rf"pid {process.pid}"):
            lock.restore_file(paths)
    finally:
        end(process)
        lock.release()


def test_a_lock_file_that_is_a_folder_is_an_error(paths: MeshPaths) -> None:
    paths.lock.mkdir(parents=True)
    for ask in (MeshLock.acquire, LockWatch.open):
        with pytest.raises(GPUMeshError, match="cannot use the lock file"):
            ask(paths)


def test_reprs_show_the_owner(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "mesh.yaml", tmp_path / "run", tmp_path / "log")
    lock = MeshLock.acquire(paths)
    assert repr(lock) == f"<MeshLock fd {lock._descriptor} pid {os.getpid()}>"
    watch = LockWatch.open(paths)
    assert watch is not None
    with watch:
        assert repr(watch).endswith(f"of pid {os.getpid()}>")
    lock.release()
