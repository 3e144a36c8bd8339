"""A mesh.yaml that lies in the current folder and may be somebody else's. With real owners and modes, which only root
can give; as another user, in a process that has become one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config.untrusted_file import untrusted_reason
from gpumesh.errors import UsageError

STRANGER, VICTIM = 54321, 12345
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir(mode=0o755)
    (folder / "mesh.yaml").write_text("nodes: [{name: a, backend: {port: 1}}]\n")
    (folder / "mesh.yaml").chmod(0o644)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GPUMESH_CONFIG", raising=False)
    monkeypatch.delenv("SUDO_UID", raising=False)
    yield folder
    folder.chmod(0o700)


def refused(match: str) -> UsageError:
    with pytest.raises(UsageError, match=match) as caught:
        config.find_config()
    assert "--config ./mesh.yaml" in (caught.value.hint or "")
    return caught.value


def test_ones_own_is_used(here: Path) -> None:
    assert config.find_config() == here / "mesh.yaml"


@root
def test_a_strangers_file_is_refused_unless_it_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(here / "mesh.yaml", STRANGER, STRANGER)
    error = refused(f"belongs to another user .*uid {STRANGER}")
    assert error.exit_code == 2
    assert config.find_config(Path("./mesh.yaml")) == here / "mesh.yaml"
    monkeypatch.setenv("GPUMESH_CONFIG", "mesh.yaml")
    assert config.find_config() == here / "mesh.yaml"


@root
def test_the_one_of_the_platforms_folder_is_not_taken_in_its_place(here: Path) -> None:
    """A person in that folder means the file that lies there, and must hear that it is not used."""
    platform = here.parent / "xdg" / "gpumesh" / "mesh.yaml"
    platform.parent.mkdir(parents=True)
    platform.write_text("x")
    os.chown(here / "mesh.yaml", STRANGER, STRANGER)
    refused("belongs to another user")


@root
def test_my_file_in_a_strangers_folder(here: Path) -> None:
    os.chown(here, STRANGER, STRANGER)
    refused(f"lies in a folder of another user .*uid {STRANGER}")


@pytest.mark.parametrize("mode", [0o646, 0o666, 0o602])
def test_what_all_may_write_to(here: Path, mode: int) -> None:
    (here / "mesh.yaml").chmod(mode)
    refused("may be written to by every user")


@root
@pytest.mark.parametrize("gid", [0, STRANGER])
def test_what_a_group_may_write_to(here: Path, gid: int) -> None:
    os.chown(here / "mesh.yaml", 0, gid)
    (here / "mesh.yaml").chmod(0o664)
    refused("may be written to by others")


def test_a_folder_that_all_may_write_to_unless_it_is_as_tmp_is(here: Path) -> None:
    here.chmod(0o777)
    refused("lies in a folder that every user of this machine may write to")
    here.chmod(0o1777)
    assert config.find_config() == here / "mesh.yaml"


@root
@pytest.mark.parametrize("gid", [0, STRANGER])
def test_a_folder_that_a_group_may_write_to_unless_it_is_as_tmp_is(here: Path, gid: int) -> None:
    os.chown(here, 0, gid)
    here.chmod(0o775)
    refused(r"lies in a folder that others may write to \(group ")
    here.chmod(0o1775)
    assert config.find_config() == here / "mesh.yaml"


@root
def test_links_count_with_all_that_they_lead_to(here: Path) -> None:
    file, elsewhere = here / "mesh.yaml", here.parent / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    file.rename(elsewhere / "real.yaml")
    (elsewhere / "link.yaml").symlink_to("real.yaml")
    file.symlink_to("../elsewhere/link.yaml")
    assert config.find_config() == elsewhere / "real.yaml"
    os.chown(elsewhere / "real.yaml", STRANGER, STRANGER)
    refused("leads to .*real.yaml, which belongs to another user")
    os.chown(elsewhere / "real.yaml", 0, 0)
    os.lchown(elsewhere / "link.yaml", STRANGER, STRANGER)
    refused("leads to .*link.yaml, which belongs to another user")
    os.lchown(elsewhere / "link.yaml", 0, 0)
    elsewhere.chmod(0o777)
    refused("leads to .*, which lies in a folder that every user")
    elsewhere.chmod(0o755)
    os.lchown(file, STRANGER, STRANGER)
    refused(r"mesh\.yaml in this folder belongs to another user")


@root
def test_who_became_root_by_sudo_is_still_its_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(here, VICTIM, VICTIM)
    os.chown(here / "mesh.yaml", VICTIM, VICTIM)
    refused("another user")
    monkeypatch.setenv("SUDO_UID", str(VICTIM))
    assert config.find_config() == here / "mesh.yaml"
    monkeypatch.setenv("SUDO_UID", "\u0661\u0662")
    refused("another user")


AS_ANOTHER = """
import grp, os, pathlib, pwd, sys  # all of it now: another user may not read where Python lies
from gpumesh import config
import gpumesh.config.mesh_file.reader
from gpumesh.errors import GPUMeshError
folder = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
os.fchdir(folder)
try:
    print("used", config.find_config().name)
except GPUMeshError as error:
    print("refused", error.message)
"""


def as_another(folder: Path, uid: int, **environment: str) -> str:
    """What a process of that user says of the folder's mesh.yaml."""
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment}
    command = [sys.executable, "-P", "-c", AS_ANOTHER, str(folder), str(uid)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=60).stdout


@root
def test_as_somebody_who_is_not_root(here: Path) -> None:
    for parent in (here, *here.parents):
        if parent.stat().st_mode & 0o005 != 0o005 and parent.is_relative_to(here.parent.parent.parent):
            parent.chmod(0o755)
    assert as_another(here, VICTIM).startswith("used"), "root's files are everybody's to trust"
    os.chown(here / "mesh.yaml", VICTIM, VICTIM)
    assert as_another(here, VICTIM).startswith("used")
    assert f"uid {VICTIM}" in as_another(here, STRANGER, SUDO_UID=str(VICTIM)), (
        "who is not root was not made so by sudo"
    )
    (here / "mesh.yaml").chmod(0o664)
    assert "may be written to by others" in as_another(here, VICTIM), "that group has nobody's name"


@root
def test_the_group_that_a_system_makes_for_each_user_is_that_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """umask 002, as Ubuntu and RHEL have it for people: all of their files may be written to by their own group."""
    import grp
    import pwd

    own = [
        user
        for user in pwd.getpwall()
        if user.pw_gid
        and any(g.gr_gid == user.pw_gid and g.gr_name == user.pw_name and not g.gr_mem for g in grp.getgrall())
    ]
    if not own:
        pytest.skip("this machine has no such user")
    os.chown(here, own[0].pw_uid, own[0].pw_gid)
    os.chown(here / "mesh.yaml", own[0].pw_uid, own[0].pw_gid)
    (here / "mesh.yaml").chmod(0o664)
    here.chmod(0o775)
    monkeypatch.setenv("SUDO_UID", str(own[0].pw_uid))
    assert untrusted_reason(Path("mesh.yaml")) is None
    os.chown(here, own[0].pw_uid, 0)
    assert "lies in a folder that others may write to" in (untrusted_reason(Path("mesh.yaml")) or "")
    os.chown(here, own[0].pw_uid, own[0].pw_gid)
    os.chown(here / "mesh.yaml", own[0].pw_uid, 0)
    assert "may be written to by others" in (untrusted_reason(Path("mesh.yaml")) or "")
