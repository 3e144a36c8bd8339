"""The askpass program alone: with a tunnel's process that answers, sends nothing, or is gone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def run(path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "gpumesh.tunnels.openssh.askpass", str(path), *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("answer", "status", "out"),
    [
        (b'"hunter2"\n', 0, b"hunter2\n"),
        (json.dumps("pässwörd \u2603").encode() + b"\n", 0, "pässwörd \u2603\n".encode()),
        (b"null\n", 1, b""),
        (b'"hunter2"', 1, b""),  # the line did not end: it may have been cut
        (b"", 1, b""),
        (b"12\n", 1, b""),
    ],
)
def test_the_programs_output_and_exit_status(tmp_path: Path, answer: bytes, status: int, out: bytes) -> None:
    path = tmp_path / "ask"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(20)
        with run(path, "me@gpu's password: ") as program:
            peer, _ = server.accept()
            with peer, peer.makefile("rb") as questions:
                assert json.loads(questions.readline()) == "me@gpu's password: "
                peer.sendall(answer)
            output, _ = program.communicate(timeout=20)
            assert (program.returncode, output) == (status, out)


def test_the_program_fails_without_a_server(tmp_path: Path) -> None:
    with run(tmp_path / "ask", "question") as program:
        assert program.communicate(timeout=20) == (b"", b"")
        assert program.returncode == 1
