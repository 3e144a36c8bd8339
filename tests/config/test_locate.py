from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.config import locate
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


def test_the_order_in_which_places_are_looked_at(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_none_anywhere() -> None:
    with pytest.raises(UsageError, match=r"there is no mesh\.yaml") as caught:
        config.find_config()
    assert "gpumesh init" in (caught.value.hint or "")


def test_a_mesh_yml_is_noticed(here: Path) -> None:
    (here / "mesh.yml").write_text("x")
    with pytest.raises(UsageError) as caught:
        config.find_config()
    assert "rename it to mesh.yaml" in (caught.value.hint or "")


def test_what_is_named_must_be_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_links_that_lead_nowhere_or_in_circles(here: Path) -> None:
    (here / "mesh.yaml").symlink_to("gone.yaml")
    with pytest.raises(UsageError) as caught:
        config.find_config()
    assert caught.value.hint == "it is a link that leads nowhere"
    (here / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UsageError):
        config.find_config(Path("loop.yaml"))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:11430", ("127.0.0.1", 11430)),
        ("8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
        (" 127.0.0.2:1 ", ("127.0.0.2", 1)),
    ],
)
def test_addresses_to_listen_on(text: str, address: tuple[str, int]) -> None:
    assert config.parse_listen_address(text, api_key_env=None) == address


@pytest.mark.parametrize(
    "text", ["", "x", ":80", "[::1", "::1:80", "[x]:1", "a b:1", "127.0.0.1:70000", "-x:1", "h:-1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        config.parse_listen_address(text, api_key_env="KEY")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("8080", ("127.0.0.1", 8080, None)),
        ("unix:/run/x.sock", (None, 0, Path("/run/x.sock"))),
        ("[::1]:1,unix:/run/a,b.sock", ("::1", 1, Path("/run/a,b.sock"))),
    ],
)
def test_a_port_a_socket_or_both(text: str, listen: tuple[object, ...]) -> None:
    assert config.parse_listen_option(text, api_key_env=None) == listen


def test_a_socket_is_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.parse_listen_option("unix:x.sock", api_key_env=None).socket == tmp_path / "x.sock"


@pytest.mark.parametrize(
    "text", ["unix:", "unix:/run/", "unix:a\nb", f"unix:/{'x' * 103}", "unix:~bob/x", "unix:x\0", "0.0.0.0:1,unix:/x"]
)
def test_what_is_no_socket(text: str) -> None:
    with pytest.raises(UsageError):
        config.parse_listen_option(text, api_key_env=None)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "192.168.1.5:1", "box:1", "[fe80::1]:1"])
def test_beyond_this_machine_only_with_a_key(text: str) -> None:
    with pytest.raises(UsageError, match="no API key is asked for"):
        config.parse_listen_address(text, api_key_env=None)
    assert config.parse_listen_address(text, api_key_env="KEY")[1] == 1


def test_loopback() -> None:
    assert all(map(locate.is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(locate.is_loopback, ("0.0.0.0", "::", "example.com", "localhost.example.com", "")))
