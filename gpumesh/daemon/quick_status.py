"""One quick look at a running mesh, without an event loop: for `status`, which is run all day and in prompts, and for
shell completion. Imports nothing but sockets and json."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from gpumesh.errors import GPUMeshError

REPLY_LIMIT = 1 << 26


def fetch_status(path: Path, *, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """What the mesh behind this socket says of itself, as JSON (a MeshState's fields); ``None``: none is running.

    Raises GPUMeshError when one is there and does not answer in time or not as a mesh would.
    """
    state = _ask(path, "GetStatus", "state", timeout_s)
    if state is not None and not isinstance(state, dict):
        raise GPUMeshError("the running mesh said what this gpumesh cannot read")
    return state


def fetch_history(path: Path, *, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """The last minute of the mesh behind this socket (a History's fields); ``None`` when it cannot be had."""
    try:
        history = _ask(path, "GetHistory", "history", timeout_s)
    except GPUMeshError:
        return None  # a mesh of an older version, or a slow one: the table goes without
    return history if isinstance(history, dict) else None


def _ask(path: Path, kind: str, key: str, timeout_s: float) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            if error.errno is None:  # Python's own: the path is longer than a socket's may be, so none can listen there
                return None
            raise GPUMeshError(f"cannot reach the running mesh at {path}: {error.strerror or error}") from error
        try:
            connection.sendall(json.dumps({"kind": kind}).encode() + b"\n")
            with connection.makefile("rb") as replies:
                line = replies.readline(REPLY_LIMIT)
        except TimeoutError as error:
            raise GPUMeshError(
                f"the running mesh did not answer within {timeout_s:.0f} s",
                hint="`gpumesh logs` says what it does; `gpumesh down` stops it",
            ) from error
        except OSError:
            return None  # it ended in this moment
    if not line:
        return None
    try:
        reply = json.loads(line)
        if reply["kind"] == "Error":
            raise GPUMeshError(str(reply["message"]), hint=reply.get("hint"))
        return reply[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GPUMeshError("the running mesh said what this gpumesh cannot read") from error
