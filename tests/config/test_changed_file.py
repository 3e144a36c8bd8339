"""Whether mesh.yaml still says what a mesh has read from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.config.changed_file import ChangedFile, read_digest, read_snapshot
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.errors import ConfigError
from tests.config.build import DIRECT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(DIRECT)
    return path


def said(changed_file: ChangedFile) -> str | None:
    finding = changed_file.find()
    assert finding is None or finding.code in ("config-changed", "config-invalid")
    return None if finding is None else finding.message


def test_the_file_is_followed_through_its_changes(file: Path) -> None:
    changed_file = ChangedFile(file, read_snapshot(file))
    assert said(changed_file) is None
    file.write_text("# only a comment\n" + DIRECT)
    assert said(changed_file) is None
    file.write_text(DIRECT.replace("11434", "11435"))
    assert "local has another backend.urls" in (said(changed_file) or "")
    assert "local has another backend.urls" in (said(changed_file) or ""), "also when it is asked again"
    file.write_text("nodes: [")
    assert "cannot be used now" in (said(changed_file) or "")
    file.unlink()
    assert "cannot be used now" in (said(changed_file) or "")
    file.write_text(DIRECT)
    assert said(changed_file) is None


def test_what_nobody_knows_is_not_said(file: Path) -> None:
    snapshot = read_snapshot(file)
    file.write_text(DIRECT.replace("11434", "11435"))
    assert said(ChangedFile(file, None)) is None, "a mesh of an older version"
    assert said(ChangedFile(file, ConfigSnapshot(snapshot.topology))) is None, "a mesh that was not made from a file"


def test_only_a_file_has_a_digest(tmp_path: Path, file: Path) -> None:
    assert read_digest(file) is not None
    assert read_digest(tmp_path) is None
    assert read_digest(tmp_path / "nothing") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_digest(tmp_path / "pipe") is None, "and the pipe is not waited for"
    with pytest.raises(ConfigError):
        read_snapshot(tmp_path / "nothing")


UNCHANGED = """
import sys
from pathlib import Path
from gpumesh.config.changed_file import ChangedFile, read_digest
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.topology import Topology
path = Path(sys.argv[1])
assert ChangedFile(path, ConfigSnapshot(Topology("m", ()), read_digest(path))).find() is None
assert not {"yaml", "pydantic"} & set(sys.modules)
"""


def test_an_unchanged_file_is_not_parsed(file: Path) -> None:
    """`gpumesh status` on a running mesh has to be quick."""
    subprocess.run([sys.executable, "-c", UNCHANGED, str(file)], check=True, timeout=30)
