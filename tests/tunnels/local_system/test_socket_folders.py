"""Private folders for sockets, and which old folders are removed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.tunnels.local_system.socket_folders import private_folder, remove_stale_folders


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as name:  # short: it holds sockets
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        folder = Path(name) / "gpumesh"
        folder.mkdir(mode=0o700)
        yield folder


def make_old_folder(runtime: Path, name: str = "sabcdefgh") -> Path:
    folder = runtime / name
    folder.mkdir(mode=0o700)
    (folder / "askpass").touch()
    return folder


def test_a_private_folder_exists_during_its_block(runtime: Path) -> None:
    with private_folder() as folder:
        (folder / "x").touch()
        remove_stale_folders(runtime)
        assert (folder / "x").exists()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


MAKE_FOLDER = """
import sys
from gpumesh.tunnels.local_system.socket_folders import private_folder
with private_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_another_process_stays_until_that_ends(runtime: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", MAKE_FOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        try:
            remove_stale_folders(runtime)
            assert folder.is_dir()
        finally:
            process.kill()
    assert folder.is_dir()
    remove_stale_folders(runtime)
    assert not folder.exists()


def test_only_our_own_folders_with_such_a_name_are_removed(runtime: Path, tmp_path: Path) -> None:
    others = [
        make_old_folder(runtime, name) for name in ("state", "sshort", "0123456789abcdef", "Sabcdefgh", "sabcdefghi")
    ]
    (runtime / "sijklmnop").touch()
    target = make_old_folder(tmp_path)
    (runtime / "sqrstuvwx").symlink_to(target)
    gone = make_old_folder(runtime)
    if os.geteuid() == 0:
        others.append(make_old_folder(runtime, "sstranger"))
        os.chown(others[-1], 54321, 54321)
    remove_stale_folders(runtime)
    assert not gone.exists()
    assert all(folder.is_dir() for folder in others)
    assert (runtime / "sijklmnop").is_file()
    assert (target / "askpass").exists()


@pytest.mark.parametrize("name", ["c", "n", "ask"])
def test_a_folder_with_a_listening_socket_stays(runtime: Path, name: str) -> None:
    """An older gpumesh holds no lock on its folder."""
    folder = make_old_folder(runtime)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / name))
        listener.listen(1)
        remove_stale_folders(runtime)
        assert (folder / name).exists()
    remove_stale_folders(runtime)
    assert not folder.exists()
