from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.config.ssh.ssh_files import MATCH_EXEC, parse_option_line, read_host_options


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def write(home: Path, text: str, name: str = "config") -> None:
    (home / ".ssh" / name).write_text(text)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("  HostName  h  ", ("hostname", "h")),
        ("Port=22", ("port", "22")),
        ("Port = 22", ("port", "22")),
        ("user", ("user", "")),
        ("# a comment", ("", "")),
        ("", ("", "")),
    ],
)
def test_a_line(line: str, parts: tuple[str, str]) -> None:
    assert parse_option_line(line) == parts


def test_before_any_host_and_the_right_one(home: Path) -> None:
    write(home, "User all\nHost a\n Port 1\nHost b c\n Port 2\nHost *\n IdentityFile ~/k\n")
    assert read_host_options("a", home) == [("user", "all"), ("port", "1"), ("identityfile", "~/k")]
    assert read_host_options("c", home) == [("user", "all"), ("port", "2"), ("identityfile", "~/k")]


def test_includes(home: Path) -> None:
    write(home, "Include more ~/.ssh/other* nowhere\nHost a\n Include in-a\n")
    write(home, "User one\n", "more")
    write(home, "Port 5\n", "other-1")
    write(home, "HostName h\n", "in-a")
    assert read_host_options("a", home) == [("user", "one"), ("port", "5"), ("hostname", "h")]
    assert ("hostname", "h") not in read_host_options("b", home)


def test_match_holds_only_where_that_is_known(home: Path) -> None:
    write(home, "Match host a\n Port 1\nMatch all\n User u\nMatch user x\n Port 3\nMatch !host a\n Port 4\n")
    assert read_host_options("a", home) == [("port", "1"), ("user", "u")]
    assert read_host_options("b", home) == [("user", "u"), ("port", "4")]


def test_what_only_a_command_knows_is_said(home: Path) -> None:
    write(home, "Match host a exec true\n Port 1\n")
    assert read_host_options("a", home) == [MATCH_EXEC]
    assert read_host_options("b", home) == []


def test_what_cannot_be_read_is_passed_over(home: Path) -> None:
    assert read_host_options("a", home) == []
    write(home, "Include config\nUser u\n")
    assert ("user", "u") in read_host_options("a", home), "and a file that includes itself has an end"
