"""Which mesh.yaml is used, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GPUMESH_CONFIG", raising=False)
    return folder


def test_the_order_of_the_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = here.parent / "xdg" / "gpumesh" / "mesh.yaml"
    platform.parent.mkdir(parents=True)
    platform.write_text("platform")
    assert config.find_config() == platform
    (here / "mesh.yaml").write_text("here")
    assert config.find_config() == here / "mesh.yaml"
    (here / "named.yaml").write_text("named")
    monkeypatch.setenv("GPUMESH_CONFIG", "named.yaml")
    assert config.find_config() == here / "named.yaml"
    (here / "explicit.yaml").write_text("explicit")
    assert config.find_config(Path("explicit.yaml")) == here / "explicit.yaml"


def test_a_link_is_followed_so_that_one_file_has_one_name(here: Path) -> None:
    (here / "mesh.yaml").write_text("x")
    (here / "link.yaml").symlink_to("mesh.yaml")
    assert config.find_config(Path("link.yaml")) == here / "mesh.yaml"


@pytest.mark.usefixtures("here")
def test_no_file_at_all() -> None:
    with pytest.raises(UsageError, match=r"there is no mesh\.yaml") as caught:
        config.find_config()
    assert "gpumesh init" in (caught.value.hint or "")


def test_a_mesh_yml_is_noticed(here: Path) -> None:
    (here / "mesh.yml").write_text("x")
    with pytest.raises(UsageError) as caught:
        config.find_config()
    assert "rename it to mesh.yaml" in (caught.value.hint or "")


def test_a_named_path_must_be_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is a folder") as caught:
        config.find_config(here)
    assert "name the mesh.yaml itself" in (caught.value.hint or "")
    (here / "mesh.yaml").write_text("x")
    with pytest.raises(UsageError) as caught:
        config.find_config(here)
    assert caught.value.hint == "did you mean mesh.yaml?"
    with pytest.raises(UsageError, match=r"none\.yaml does not exist"):
        config.find_config(Path("none.yaml"))
    with pytest.raises(UsageError, match=r"'a\\x00b'"):
        config.find_config(Path("a\0b"))
    with pytest.raises(UsageError, match="cannot use"):
        config.find_config(Path("x" * 5000))
    monkeypatch.setenv("GPUMESH_CONFIG", "gone.yaml")
    with pytest.raises(UsageError, match=r"named by \$GPUMESH_CONFIG"):
        config.find_config()


def test_dangling_and_circular_links_are_refused(here: Path) -> None:
    (here / "mesh.yaml").symlink_to("gone.yaml")
    with pytest.raises(UsageError) as caught:
        config.find_config()
    assert caught.value.hint == "it is a link that leads nowhere"
    (here / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UsageError):
        config.find_config(Path("loop.yaml"))
