from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.files import atomic_file

KILLED = """
import os, signal, sys
from pathlib import Path
from gpumesh.files import atomic_file
def stops(*_):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
os.replace = stops
atomic_file.replace(Path(sys.argv[1]), "half")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replace_sets_content_and_mode(tmp_path: Path) -> None:
    target = tmp_path / "mesh.yaml"
    atomic_file.replace(target, "one\n", mode=0o640)
    atomic_file.replace(target, "zwei ☃\n", mode=0o644)
    assert target.read_bytes() == "zwei ☃\n".encode()
    assert target.stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["mesh.yaml"]


def test_a_failed_replacement_leaves_the_file_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "mesh.yaml"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_file.replace(target, "\udc80")
    assert (target.read_text(), names(tmp_path)) == ("old", ["mesh.yaml"])


def test_a_file_that_is_written_piece_by_piece(tmp_path: Path) -> None:
    target = tmp_path / "results.jsonl"
    target.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), atomic_file.open_replacement(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (target.read_text(), names(tmp_path)) == ("old", ["results.jsonl"])
    with atomic_file.open_replacement(target, mode=0o644) as file:
        file.write(b"new\n")
        assert target.read_text() == "old"
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new\n", 0o644)
    assert names(tmp_path) == ["results.jsonl"]


def test_the_next_writer_removes_files_of_a_killed_writer(tmp_path: Path) -> None:
    target = tmp_path / "mesh.yaml"
    target.write_text("old")
    kept = [tmp_path / name for name in (".mesh.yaml.20261124", ".mesh.yaml.gpumesh-mine", ".other.gpumesh-abcdefgh")]
    for path in kept:
        path.write_text("somebody's own")
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(target), "killed"], timeout=60, check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 5
    assert target.read_text() == "old"
    atomic_file.replace(target, "new")
    assert names(tmp_path) == sorted(["mesh.yaml", *(path.name for path in kept)])


def test_a_file_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "mesh.yaml"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(target), "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        (half,) = tmp_path.iterdir()
        atomic_file.replace(target, "new")
        assert half.exists()
        if os.geteuid() == 0:
            os.chown(half, 54321, 54321)
        process.kill()
    atomic_file.replace(target, "newer")
    assert half.exists() == (os.geteuid() == 0), "another user's is not ours to remove"


def test_create_never_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "mesh.yaml"
    atomic_file.create(target, "first", mode=0o640)
    with pytest.raises(FileExistsError):
        atomic_file.create(target, "second")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("first", 0o640)
    assert names(tmp_path) == ["mesh.yaml"]
