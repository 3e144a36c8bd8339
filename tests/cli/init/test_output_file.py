from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumesh.cli.init.output_file import write_output
from gpumesh.errors import UsageError


def test_it_never_overwrites_a_file_without_force(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    write_output(file, "a: 1\n", force=False)
    assert file.read_text() == "a: 1\n"
    with pytest.raises(UsageError, match="is there already"):
        write_output(file, "b: 2\n", force=False)
    write_output(file, "c: 3\n", force=True)
    assert file.read_text() == "c: 3\n"
    assert os.listdir(tmp_path) == ["mesh.yaml"]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    with pytest.raises(UnicodeEncodeError):
        write_output(file, "a: \ud800\n" * 10_000, force=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="cannot write"):
        write_output(tmp_path / "nowhere" / "mesh.yaml", "", force=False)


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    before = os.umask(0o027)
    try:
        write_output(file, "a: 1\n", force=False)
        assert os.umask(0o027) == 0o027, "the umask is as it was"
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640
