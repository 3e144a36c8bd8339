"""The protocol ``Session``: the operations of a mesh (status, watch, chat, exec, drain …), wherever the mesh runs.

Commands use this protocol alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from gpumesh.backends.base import Chunk, Message
from gpumesh.balancer.base import Priority
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.mesh.history import History
from gpumesh.mesh.outages.outage import Outage
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPlan, PoolState
from gpumesh.state import MeshState
from gpumesh.tunnels.base import ExecChunk


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt, and how the mesh is to serve it. If ``model`` is ``None``, the default model answers, or the only
    model.

    ``node`` names the only node that may answer; ``None`` is any node. ``options`` have Ollama's names. ``timeout_s``
    counts from the start to the last token; ``None`` means the gateway's own time-out. ``session`` is the same for
    prompts that begin in the same way: a node that has their beginning in its cache gets them.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    node: str | None = None
    priority: Priority = Priority.INTERACTIVE
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stream: bool = True
    think: bool | str | None = None
    timeout_s: float | None = None
    session: str | None = None


class PromptAnswer(Protocol):
    """The answer to one prompt, chunk by chunk. ``node`` and ``attempts`` are known from the first chunk on, and final
    after the last."""

    @property
    def node(self) -> str | None: ...

    @property
    def attempts(self) -> int: ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class Session(Protocol):
    """A mesh as its users see it.

    Each method raises GPUMeshError with the true reason. Cancelling a method ends what the method began, also on the
    remote host.
    """

    async def status(self) -> MeshState:
        """Returns the state of the mesh now."""
        ...

    def watch(self, interval_s: float) -> AsyncIterator[MeshState]:
        """Yields the state now, and again after changes, at most once in ``interval_s`` seconds."""
        ...

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        """Waits until each node has been probed once or has failed, for ``timeout_s`` seconds at most. Returns the
        state then."""
        ...

    def chat(self, prompt: PromptRequest) -> AbstractAsyncContextManager[PromptAnswer]:
        """Sends a prompt and yields the stream of its answer. The end of the block stops the generation."""
        ...

    def exec(self, node: str, argv: Sequence[str]) -> AsyncIterator[ExecChunk]:
        """Runs a command on the node's host and yields its output. In the last chunk, ``ended`` is true.

        Closing the iterator ends the command.
        """
        ...

    async def drain(self, node: str) -> None:
        """Sends no new requests to this node. The running requests end by themselves."""
        ...

    async def resume(self, node: str) -> None:
        """Ends the draining of this node: it gets new requests again."""
        ...

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:
        """Takes the node out of service during the block. The mesh puts it back when the block ends, and also when this
        process ends in the block in any way, kill -9 included."""
        ...

    async def reconnect(self, node: str) -> None:
        """Lets the node's tunnel connect at once if it waits for its next attempt. A tunnel that is up is checked, and
        keeps its connections."""

    async def configuration(self) -> ConfigSnapshot | None:
        """Returns what the mesh has read from its mesh.yaml; ``None``: the mesh is of an older version, which does not
        tell."""
        ...

    async def reload(self) -> ReloadReport:
        """Lets the mesh read its mesh.yaml again, and take over what has changed.

        Requests in flight end where they are. Returns when new requests are served as the file says; new tunnels may
        still be connecting then. Raises ConfigError, or an error with its code and exit code, if the file cannot be
        used: then nothing has changed."""
        ...

    async def history(self) -> History:
        """Returns the last minute of the mesh, as far as the mesh has recorded it."""
        ...

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        """Plans a pool, which need not be in mesh.yaml, from what its hosts offer now. Starts nothing.

        A plan that does not fit says so in its ``problems``. Raises PoolError when a member cannot take part or the
        model cannot be read."""
        ...

    def start_pool(self, name: str) -> AsyncIterator[PoolState]:
        """Starts a pool of mesh.yaml, and yields its state now and after changes, until it is ready: that is the last
        state. A pool that waits for its next start is tried at once; a pool that is ready already stays as it is.

        After a failure that may pass, the pool is started again, and the iteration goes on. Raises UsageError for an
        unknown pool, and PoolError when a person must act. Closing the iterator before the pool is ready stops the
        pool, unless it was wanted before."""
        ...

    async def stop_pool(self, name: str) -> None:
        """Ends a pool and all its programs on its hosts. Its requests may end where they are for a moment, then they
        move to other nodes. Raises UsageError for an unknown pool."""
        ...

    async def pools(self) -> tuple[PoolState, ...]:
        """Returns the states of all pools of mesh.yaml, in its order."""
        ...
