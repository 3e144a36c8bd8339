"""Errors of a command that talks to a running mesh: no mesh runs, its control socket fails, its reply is unreadable.

Both clients raise these errors: ``RemoteSession`` and ``quick_status``. A reply that cannot be read usually comes from
a mesh that runs another version of gpumesh.
"""

from __future__ import annotations

from pathlib import Path

from gpumesh.errors import GPUMeshError, MeshNotRunning


def connect_error(error: OSError, path: Path) -> GPUMeshError:
    """Returns the error for a client that could not connect to the socket at ``path``; MeshNotRunning when no mesh
    listens there."""
    # For a path that is too long for a socket, Python itself raises an OSError without errno. No mesh can listen there.
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)) or error.errno is None:
        return MeshNotRunning("no mesh is running for this configuration")
    return GPUMeshError(f"cannot reach the running mesh at {path}: {error.strerror or error}")


class MeshEnded(GPUMeshError):
    """The mesh ended in the middle of a request over its control socket."""

    code = MeshNotRunning.code
    default_hint = "`gpumesh logs` says why"

    def __init__(self) -> None:
        super().__init__("the running mesh ended in the middle of this")


def unreadable_reply(detail: object = None) -> GPUMeshError:
    """Returns the error for a reply that this version of gpumesh does not understand. ``detail``: what is wrong."""
    message = "the running mesh sent a reply that this gpumesh cannot read"
    return GPUMeshError(message if detail is None else f"{message}: {detail}")
