"""The lines of the control socket: each message is one JSON object on one line. This file encodes and decodes lines,
limits their length, and makes the errors of a client that cannot connect or cannot read a line.

Both clients share this file: ``RemoteSession`` and ``quick_status``. It imports json and the errors only, because
``status`` and shell completion must start quickly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpumesh.errors import GPUMeshError, MeshNotRunning

# Bytes of one message. A prompt with images is some MB of base64; no gpumesh sends a longer line than this.
LINE_LIMIT = 1 << 26


def encode_line(kind: str, fields: Mapping[str, Any]) -> bytes:
    """One line, with its line feed."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def decode_line(line: bytes) -> tuple[str, dict[str, Any]]:
    """Returns the kind of the message and its whole JSON object. Raises ``ValueError`` and ``RecursionError``."""
    document = json.loads(line)
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str):
        raise unknown_message()
    return kind, document


def unknown_message() -> ValueError:
    return ValueError("not a message that this gpumesh knows; is the running mesh of another version?")


def connect_error(error: OSError, path: Path) -> GPUMeshError:
    """The error to raise when connecting to the socket failed; MeshNotRunning when no mesh listens there."""
    # For a path that is too long for a socket, Python itself raises an OSError without errno. No mesh can listen there.
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)) or error.errno is None:
        return MeshNotRunning("no mesh is running for this configuration")
    return GPUMeshError(f"cannot reach the running mesh at {path}: {error.strerror or error}")


def unreadable_reply(detail: object = None) -> GPUMeshError:
    """The error for a reply that this version does not understand."""
    message = "the running mesh sent a reply that this gpumesh cannot read"
    return GPUMeshError(message if detail is None else f"{message}: {detail}")
