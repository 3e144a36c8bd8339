"""Addresses to listen on: their forms, and the key that other machines need."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.errors import UsageError


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
def test_parse_listen_address(text: str, address: tuple[str, int]) -> None:
    assert config.parse_listen_address(text, has_key=False) == address


@pytest.mark.parametrize(
    "text", ["", "x", ":80", "[::1", "::1:80", "[x]:1", "a b:1", "127.0.0.1:70000", "-x:1", "h:-1"]
)
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        config.parse_listen_address(text, has_key=True)


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("8080", ("127.0.0.1", 8080, None)),
        ("unix:/run/x.sock", (None, 0, Path("/run/x.sock"))),
        ("[::1]:1,unix:/run/a,b.sock", ("::1", 1, Path("/run/a,b.sock"))),
    ],
)
def test_parse_listen_option(text: str, listen: tuple[object, ...]) -> None:
    assert config.parse_listen_option(text, has_key=False) == listen


def test_a_relative_socket_path_starts_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.parse_listen_option("unix:x.sock", has_key=False).socket == tmp_path / "x.sock"


@pytest.mark.parametrize(
    "text", ["unix:", "unix:/run/", "unix:a\nb", f"unix:/{'x' * 103}", "unix:~bob/x", "unix:x\0", "0.0.0.0:1,unix:/x"]
)
def test_an_invalid_socket_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        config.parse_listen_option(text, has_key=False)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "192.168.1.5:1", "box:1", "[fe80::1]:1"])
def test_an_address_beyond_loopback_needs_a_key(text: str) -> None:
    with pytest.raises(UsageError, match="no API key is asked for"):
        config.parse_listen_address(text, has_key=False)
    assert config.parse_listen_address(text, has_key=True)[1] == 1


def test_is_loopback() -> None:
    assert all(map(config.is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(config.is_loopback, ("0.0.0.0", "::", "example.com", "localhost.example.com", "")))
