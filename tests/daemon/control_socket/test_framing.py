from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.daemon.control_socket import framing
from gpumesh.errors import MeshNotRunning


def test_a_message_is_one_line() -> None:
    line = framing.encode_line("Drain", {"node": "a\nb"})
    assert line.count(b"\n") == 1
    assert framing.decode_line(line) == ("Drain", {"kind": "Drain", "node": "a\nb"})


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b"{}", b'{"kind": 5}', b"null"])
def test_another_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        framing.decode_line(line)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), ConnectionRefusedError(111, "x"), OSError("too long")])
def test_where_nobody_listens_no_mesh_runs(error: OSError) -> None:
    assert isinstance(framing.connect_error(error, Path("s")), MeshNotRunning)


def test_another_connect_error_is_named() -> None:
    error = framing.connect_error(PermissionError(13, "Permission denied"), Path("/run/s"))
    assert not isinstance(error, MeshNotRunning)
    assert error.message == "cannot reach the running mesh at /run/s: Permission denied"
