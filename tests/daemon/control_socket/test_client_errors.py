from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh.daemon.control_socket import client_errors
from gpumesh.errors import MeshNotRunning


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), ConnectionRefusedError(111, "x"), OSError("too long")])
def test_where_nobody_listens_no_mesh_runs(error: OSError) -> None:
    assert isinstance(client_errors.connect_error(error, Path("s")), MeshNotRunning)


def test_another_connect_error_is_named() -> None:
    error = client_errors.connect_error(PermissionError(13, "Permission denied"), Path("/run/s"))
    assert not isinstance(error, MeshNotRunning)
    assert error.message == "cannot reach the running mesh at /run/s: Permission denied"
