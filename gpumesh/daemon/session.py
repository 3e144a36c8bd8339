"""What can be asked of a mesh, wherever it runs. The command line is written against this protocol alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from gpumesh.backends.base import Chunk, Message
from gpumesh.balancer.base import Priority
from gpumesh.mesh.history import History
from gpumesh.state import MeshState
from gpumesh.tunnels.base import ExecChunk


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt, and how it is to be served. ``model`` ``None``: the default model, or the only one there is.

    ``options`` are Ollama's names. ``timeout_s`` counts from now to the last token; ``None``: the gateway's own.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    node: str | None = None
    priority: Priority = Priority.INTERACTIVE
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stream: bool = True
    think: bool | str | None = None
    timeout_s: float | None = None


class ChatStream(Protocol):
    """One answer as it comes. ``node`` and ``attempts`` are known from the first chunk on, final after the last."""

    @property
    def node(self) -> str | None: ...

    @property
    def attempts(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class Session(Protocol):
    """A mesh as its users see it. Every method raises GPUMeshError with the true reason; cancelling any of them ends
    what it began, on the remote host as well."""

    async def status(self) -> MeshState: ...

    def watch(self, interval_s: float) -> AsyncIterator[MeshState]:
        """The state now, and again after changes, at most once in ``interval_s``."""
        ...

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        """When every node has been probed once or has failed, or the time is over: the state then."""
        ...

    def chat(self, ask: PromptRequest) -> AbstractAsyncContextManager[ChatStream]: ...

    def exec(self, node: str, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """Runs a command on the node's host; the last chunk has ``ended``. Closing the iterator ends the command."""
        ...

    async def drain(self, node: str) -> None: ...

    async def resume(self, node: str) -> None: ...

    async def reconnect(self, node: str) -> None:
        """Tries its tunnel again at once if it waits, checks it if it is up; what runs on it is not cut."""

    async def history(self) -> History:
        """The last minute, as far as somebody has kept it."""
        ...
