"""gpumesh: GPUs behind SSH as one fast endpoint. ``connect`` and ``connect_sync`` are the entry to the library.

The names of ``__all__`` stay as they are (docs/library.md). Each is imported only on first use, so that the command
line starts quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpumesh import errors as errors
    from gpumesh.errors import AuthRefused as AuthRefused
    from gpumesh.errors import BackendError as BackendError
    from gpumesh.errors import BackendStatus as BackendStatus
    from gpumesh.errors import ConfigError as ConfigError
    from gpumesh.errors import DeadlineExceeded as DeadlineExceeded
    from gpumesh.errors import GPUMeshError as GPUMeshError
    from gpumesh.errors import MeshAlreadyRunning as MeshAlreadyRunning
    from gpumesh.errors import MeshNotRunning as MeshNotRunning
    from gpumesh.errors import ModelMissing as ModelMissing
    from gpumesh.errors import NoNodeError as NoNodeError
    from gpumesh.errors import QueueFull as QueueFull
    from gpumesh.errors import SecretMissing as SecretMissing
    from gpumesh.errors import ServersFailed as ServersFailed
    from gpumesh.errors import StreamCut as StreamCut
    from gpumesh.errors import TunnelError as TunnelError
    from gpumesh.errors import UsageError as UsageError
    from gpumesh.library.client import MeshClient as MeshClient
    from gpumesh.library.client import connect as connect
    from gpumesh.library.messages import Message as Message
    from gpumesh.library.messages import ToolCall as ToolCall
    from gpumesh.library.other_clients import ollama_client as ollama_client
    from gpumesh.library.other_clients import openai_client as openai_client
    from gpumesh.library.reply import Reply as Reply
    from gpumesh.library.results import BatchResult as BatchResult
    from gpumesh.library.results import Completion as Completion
    from gpumesh.library.results import Embeddings as Embeddings
    from gpumesh.library.results import FleetModel as FleetModel
    from gpumesh.library.results import ReplyChunk as ReplyChunk
    from gpumesh.library.sync import SyncMeshClient as SyncMeshClient
    from gpumesh.library.sync import SyncReply as SyncReply
    from gpumesh.library.sync import connect_sync as connect_sync
    from gpumesh.mesh.mesh import Mesh as Mesh
    from gpumesh.state import MeshState as MeshState
    from gpumesh.topology import Priority as Priority

__version__ = "0.1.0"

_HOMES = {
    "gpumesh.errors": (
        "AuthRefused",
        "BackendError",
        "BackendStatus",
        "ConfigError",
        "DeadlineExceeded",
        "GPUMeshError",
        "MeshAlreadyRunning",
        "MeshNotRunning",
        "ModelMissing",
        "NoNodeError",
        "QueueFull",
        "SecretMissing",
        "ServersFailed",
        "StreamCut",
        "TunnelError",
        "UsageError",
    ),
    "gpumesh.library.client": ("MeshClient", "connect"),
    "gpumesh.library.messages": ("Message", "ToolCall"),
    "gpumesh.library.other_clients": ("ollama_client", "openai_client"),
    "gpumesh.library.reply": ("Reply",),
    "gpumesh.library.results": ("BatchResult", "Completion", "Embeddings", "FleetModel", "ReplyChunk"),
    "gpumesh.library.sync": ("SyncMeshClient", "SyncReply", "connect_sync"),
    "gpumesh.mesh.mesh": ("Mesh",),
    "gpumesh.state": ("MeshState",),
    "gpumesh.topology": ("Priority",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AuthRefused",
    "BackendError",
    "BackendStatus",
    "BatchResult",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Embeddings",
    "FleetModel",
    "GPUMeshError",
    "Mesh",
    "MeshAlreadyRunning",
    "MeshClient",
    "MeshNotRunning",
    "MeshState",
    "Message",
    "ModelMissing",
    "NoNodeError",
    "Priority",
    "QueueFull",
    "Reply",
    "ReplyChunk",
    "SecretMissing",
    "ServersFailed",
    "StreamCut",
    "SyncMeshClient",
    "SyncReply",
    "ToolCall",
    "TunnelError",
    "UsageError",
    "__version__",
    "connect",
    "connect_sync",
    "errors",
    "ollama_client",
    "openai_client",
]


def __getattr__(name: str) -> Any:
    """Imports a name when it is used for the first time (PEP 562)."""
    from importlib import import_module

    if name == "errors":
        return import_module("gpumesh.errors")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
