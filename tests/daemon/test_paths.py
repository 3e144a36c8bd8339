from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.daemon.paths import SOCKET_PATH_LIMIT, MeshPaths, for_config
from gpumesh.errors import GPUMeshError


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, as it is in life: it holds a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield Path(folder)


def test_paths_do_not_depend_on_how_mesh_yaml_is_named(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.yaml"
    file.touch()
    (tmp_path / "link.yaml").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    paths = for_config(file)
    assert for_config(Path("mesh.yaml")) == for_config(tmp_path / "x" / ".." / "mesh.yaml") == paths
    assert for_config(tmp_path / "link.yaml") == paths
    assert for_config(tmp_path / "other.yaml").folder != paths.folder
    assert paths.folder.parent == runtime / "gpumesh"
    assert paths.log.parent == tmp_path / "state" / "gpumesh" / "logs"
    assert not paths.folder.exists()


def test_the_folder_is_private_and_can_be_removed(tmp_path: Path) -> None:
    paths = for_config(tmp_path / "mesh.yaml")
    paths.create_folder()
    paths.create_folder()
    assert stat.S_IMODE(paths.folder.stat().st_mode) == 0o700
    paths.socket.touch()
    paths.lock.touch()
    paths.stderr_log.parent.mkdir(parents=True)
    paths.stderr_log.touch()
    paths.remove_files()
    paths.remove_files()
    assert not paths.folder.exists()
    assert not paths.stderr_log.exists()


def test_a_stderr_log_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    paths = for_config(tmp_path / "mesh.yaml")
    paths.create_folder()
    paths.stderr_log.parent.mkdir(parents=True)
    paths.stderr_log.write_text("Fatal Python error")
    paths.remove_files()
    assert paths.stderr_log.read_text() == "Fatal Python error"


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "mesh.yaml", tmp_path / ("x" * SOCKET_PATH_LIMIT), tmp_path / "log")
    with pytest.raises(GPUMeshError, match="longer than a Unix socket's may be") as caught:
        paths.create_folder()
    assert "XDG_RUNTIME_DIR" in str(caught.value.hint)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GPUMeshError, match="cannot use the runtime folder"):
        MeshPaths(tmp_path / "mesh.yaml", tmp_path / "file" / "x", tmp_path / "log").create_folder()


def test_a_mesh_in_the_users_other_runtime_folder_is_found(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service of the whole system has no XDG_RUNTIME_DIR, and the same user's shell has."""
    file = tmp_path / "mesh.yaml"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    paths = for_config(file)
    paths.create_folder()
    paths.lock.touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    try:
        assert paths.folder.parent != runtime / "gpumesh"
        assert for_config(file) == paths
        own = for_config(tmp_path / "other.yaml")
        assert own.folder.parent == runtime / "gpumesh"
    finally:
        paths.remove_files()
    assert for_config(file).folder.parent == runtime / "gpumesh"
