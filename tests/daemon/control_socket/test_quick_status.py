"""The client without an event loop, against made-up servers. (Against the real server: test_server.py.)"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumesh.daemon.control_socket.quick_status import fetch_history, fetch_status
from gpumesh.errors import GPUMeshError


@contextmanager
def server_answering(path: Path, reply: bytes | None) -> Iterator[list[bytes]]:
    """A server that answers one connection with ``reply``; ``None``: never."""
    requests: list[bytes] = []
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                requests.append(connection.makefile("rb").readline())
                if reply is None:
                    done.wait(20)
                else:
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield requests
        finally:
            done.set()
            thread.join()


def test_no_mesh_runs(tmp_path: Path) -> None:
    assert fetch_status(tmp_path / "nothing") is None
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stale))
    assert fetch_status(stale) is None
    assert fetch_history(stale) is None
    assert fetch_status(tmp_path / ("x" * 200)) is None, "no mesh can listen at so long a path"


def test_request_and_answer(tmp_path: Path) -> None:
    with server_answering(tmp_path / "s", b'{"kind": "State", "state": {"mesh": "x"}}\n') as requests:
        assert fetch_status(tmp_path / "s") == {"mesh": "x"}
    assert requests == [b'{"kind": "GetStatus"}\n']
    with server_answering(tmp_path / "h", b'{"kind": "Past", "history": {"step_s": 5.0}}\n') as requests:
        assert fetch_history(tmp_path / "h") == {"step_s": 5.0}
    assert requests == [b'{"kind": "GetHistory"}\n']


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"nonsense\n", "that this gpumesh cannot read"),
        (b"[]\n", "that this gpumesh cannot read"),
        (b'{"kind": "State"}\n', "that this gpumesh cannot read"),
        (b'{"kind": "State", "state": 5}\n', "that this gpumesh cannot read"),
        (b'{"kind": "Error", "message": "it is ill", "hint": "rest"}\n', "it is ill"),
    ],
)
def test_an_unusable_reply_is_an_error(tmp_path: Path, reply: bytes, message: str) -> None:
    with server_answering(tmp_path / "s", reply), pytest.raises(GPUMeshError, match=message):
        fetch_status(tmp_path / "s")


@pytest.mark.parametrize("reply", [b"", b"nonsense\n", b'{"kind": "Error", "message": "no such kind"}\n', b"[1]\n"])
def test_a_mesh_without_history_is_no_error(tmp_path: Path, reply: bytes) -> None:
    """A mesh of an older version does not know this request."""
    with server_answering(tmp_path / "s", reply):
        assert fetch_history(tmp_path / "s") is None


def test_a_mesh_that_ends_before_its_answer_counts_as_not_running(tmp_path: Path) -> None:
    with server_answering(tmp_path / "s", b""):
        assert fetch_status(tmp_path / "s") is None


def test_a_mesh_that_hangs_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    with server_answering(tmp_path / "s", None), pytest.raises(GPUMeshError, match="did not answer within") as caught:
        fetch_status(tmp_path / "s", timeout_s=0.1)
    assert "`gpumesh down` stops it" in str(caught.value.hint)


def test_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, gpumesh.daemon.control_socket.quick_status\n"
        "print(sorted({'asyncio', 'pydantic', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
