"""Asks a running mesh for its status or its last minute, without an event loop.

For `status`, which runs all day and in shell prompts, and for shell completion. So this imports sockets and json only.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from gpumesh.daemon.control_socket import framing
from gpumesh.errors import GPUMeshError, MeshNotRunning


def fetch_status(path: Path, *, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """The state of the mesh behind this socket, as JSON (the fields of a MeshState); ``None`` when no mesh runs.

    Raises GPUMeshError when a mesh is there and does not answer in time, or sends an answer that cannot be read.
    """
    state = _fetch(path, "GetStatus", "state", timeout_s)
    if state is not None and not isinstance(state, dict):
        raise framing.unreadable_reply()
    return state


def fetch_history(path: Path, *, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """The last minute of the mesh behind this socket (the fields of a History); ``None`` when no mesh gives it."""
    try:
        history = _fetch(path, "GetHistory", "history", timeout_s)
    except GPUMeshError:
        return None  # a mesh of an older version, or a slow one: the table is shown without it
    return history if isinstance(history, dict) else None


def _fetch(path: Path, request_kind: str, reply_key: str, timeout_s: float) -> Any:
    """The value of ``reply_key`` in the reply to such a request; ``None`` when no mesh runs, or the mesh is ending."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            failure = framing.connect_error(error, path)
            if isinstance(failure, MeshNotRunning):
                return None
            raise failure from error
        try:
            connection.sendall(framing.encode_line(request_kind, {}))
            with connection.makefile("rb") as replies:
                line = replies.readline(framing.LINE_LIMIT)
        except TimeoutError as error:
            raise GPUMeshError(
                f"the running mesh did not answer within {timeout_s:.0f} s",
                hint="`gpumesh logs` says what it does; `gpumesh down` stops it",
            ) from error
        except OSError:
            return None  # the mesh ended at this moment
    return _read_reply(line, reply_key) if line else None


def _read_reply(line: bytes, key: str) -> Any:
    try:
        kind, document = framing.decode_line(line)
        if kind == "Error":
            raise GPUMeshError(str(document["message"]), hint=document.get("hint"))
        return document[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise framing.unreadable_reply() from error
