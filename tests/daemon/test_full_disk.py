from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpumesh.daemon import full_disk
from gpumesh.daemon.__main__ import describe_error

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of its own, with one block and one file left, for the folder of logs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "full"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "full" / "gpumesh"


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: int) -> None:
    """The system says these figures of the file system of ``folder``."""
    room = {"f_bavail": 1, "f_files": 10, "f_favail": 1}

    def statvfs(path: Path) -> SimpleNamespace:
        return SimpleNamespace(**({**room, **changes} if Path(path) == folder else room))

    monkeypatch.setattr(os, "statvfs", statvfs)


@pytest.mark.parametrize("changes", [{"f_bavail": 0}, {"f_favail": 0}])
def test_the_folder_that_is_full_is_named(
    state_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    limit(monkeypatch, state_folder, **changes)
    assert describe_error(FULL) == f"No space left on device in {state_folder}"
    assert describe_error(ExceptionGroup("x", [FULL])) == f"No space left on device in {state_folder}"


def test_no_folder_is_named_without_a_reason(state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, state_folder, f_favail=0, f_files=0)
    assert full_disk.describe_full_folders(FULL) == "", "this file system counts no files"
    limit(monkeypatch, state_folder, f_bavail=0)
    assert describe_error(OSError(errno.EACCES, "Permission denied", "/a")) == "/a: Permission denied"
    assert describe_error(OSError(errno.ENOSPC, "No space left on device", "/a")) == "/a: No space left on device"
