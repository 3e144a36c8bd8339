"""A look without an event loop. (Against the real server: test_control.)"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumesh.daemon.quick_status import fetch_history, fetch_status
from gpumesh.errors import GPUMeshError


@contextmanager
def answering(path: Path, reply: bytes | None) -> Iterator[list[bytes]]:
    """A server that answers one connection with ``reply``; ``None``: never."""
    asked: list[bytes] = []
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.makefile("rb").readline())
                if reply is None:
                    done.wait(20)
                else:
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            done.set()
            thread.join()


def test_nobody_is_there(tmp_path: Path) -> None:
    assert fetch_status(tmp_path / "nothing") is None
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stale))
    assert fetch_status(stale) is None
    assert fetch_history(stale) is None
    assert fetch_status(tmp_path / ("x" * 200)) is None, "no mesh can listen at so long a path"


def test_what_is_asked_and_answered(tmp_path: Path) -> None:
    with answering(tmp_path / "s", b'{"kind": "State", "state": {"mesh": "x"}}\n') as asked:
        assert fetch_status(tmp_path / "s") == {"mesh": "x"}
    assert asked == [b'{"kind": "GetStatus"}\n']
    with answering(tmp_path / "h", b'{"kind": "Past", "history": {"step_s": 5.0}}\n') as asked:
        assert fetch_history(tmp_path / "h") == {"step_s": 5.0}
    assert asked == [b'{"kind": "GetHistory"}\n']


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"nonsense\n", "what this gpumesh cannot read"),
        (b"[]\n", "what this gpumesh cannot read"),
        (b'{"kind": "State"}\n', "what this gpumesh cannot read"),
        (b'{"kind": "State", "state": 5}\n', "what this gpumesh cannot read"),
        (b'{"kind": "Error", "message": "it is ill", "hint": "rest"}\n', "it is ill"),
    ],
)
def test_what_is_no_answer(tmp_path: Path, reply: bytes, said: str) -> None:
    with answering(tmp_path / "s", reply), pytest.raises(GPUMeshError, match=said):
        fetch_status(tmp_path / "s")


@pytest.mark.parametrize("reply", [b"", b"nonsense\n", b'{"kind": "Error", "message": "no such kind"}\n', b"[1]\n"])
def test_a_mesh_without_a_past_is_no_error(tmp_path: Path, reply: bytes) -> None:
    """One of an older version does not know the question."""
    with answering(tmp_path / "s", reply):
        assert fetch_history(tmp_path / "s") is None


def test_it_ends_in_this_moment(tmp_path: Path) -> None:
    with answering(tmp_path / "s", b""):
        assert fetch_status(tmp_path / "s") is None


def test_one_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with answering(tmp_path / "s", None), pytest.raises(GPUMeshError, match="did not answer within") as caught:
        fetch_status(tmp_path / "s", timeout_s=0.1)
    assert "`gpumesh down` stops it" in str(caught.value.hint)


def test_it_costs_next_to_nothing_to_import() -> None:
    script = (
        "import sys, gpumesh.daemon.quick_status; print(sorted({'asyncio', 'pydantic', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
