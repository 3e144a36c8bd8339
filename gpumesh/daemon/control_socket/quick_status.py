"""Asks a running mesh for its status, its last minute or its configuration, without an event loop.

For `status`, which runs all day and in shell prompts, and for shell completion. So this module imports sockets and json
only.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from gpumesh.daemon.control_socket import client_errors, framing
from gpumesh.errors import GPUMeshError, MeshNotRunning


def fetch_status(path: Path, *, timeout_s: float = 5.0) -> dict[str, Any] | None:
    """Returns the state of the mesh behind this socket as JSON (the fields of a MeshState); ``None`` if no mesh runs.

    Raises GPUMeshError when a mesh is there and does not answer in time, or sends an answer that cannot be read.
    """
    state = _fetch(path, "GetStatus", "state", timeout_s)
    if state is not None and not isinstance(state, dict):
        raise client_errors.unreadable_reply()
    return state


def fetch_history(path: Path, *, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """Returns the last minute of the mesh behind this socket as JSON (the fields of a History).

    Returns ``None`` when no mesh runs, and when an old or slow mesh gives no history: the table is shown without it.
    """
    try:
        history = _fetch(path, "GetHistory", "history", timeout_s)
    except GPUMeshError:  # the table is shown without the history
        return None
    return history if isinstance(history, dict) else None


def fetch_configuration(path: Path, *, timeout_s: float = 2.0) -> dict[str, Any] | None:
    """Returns what the mesh behind this socket has read from its mesh.yaml, as JSON (the fields of a ConfigSnapshot).

    Returns ``None`` when no mesh runs, and when an old or slow mesh does not tell.
    """
    try:
        snapshot = _fetch(path, "GetConfiguration", "snapshot", timeout_s)
    except GPUMeshError:
        return None
    return snapshot if isinstance(snapshot, dict) else None


def _fetch(path: Path, request_kind: str, reply_key: str, timeout_s: float) -> Any:
    """Sends a request of this kind, and returns the value of ``reply_key`` in the first reply.

    Returns ``None`` when no mesh runs, or when the mesh ends at this moment. Raises GPUMeshError as ``fetch_status``
    does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            failure = client_errors.connect_error(error, path)
            if isinstance(failure, MeshNotRunning):
                return None
            raise failure from error
        try:
            connection.sendall(framing.encode_line(request_kind, {}))  # none of these requests has fields
            with connection.makefile("rb") as replies:
                line = replies.readline(framing.LINE_LIMIT)
        except TimeoutError as error:
            raise GPUMeshError(
                f"the running mesh did not answer within {timeout_s:.0f} s",
                hint="`gpumesh logs` says what it does; `gpumesh down` stops it",
            ) from error
        except OSError:  # the mesh ended at this moment
            return None
    return _read_reply(line, reply_key) if line else None


def _read_reply(line: bytes, key: str) -> Any:
    """Returns the value of ``key`` in a reply. Raises GPUMeshError for an ``Error`` and for an unreadable reply."""
    try:
        kind, document = framing.decode_line(line)
        if kind == "Error":
            raise GPUMeshError(str(document["message"]), hint=document.get("hint"))
        return document[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise client_errors.unreadable_reply() from error
