"""A Session over a Mesh in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from gpumesh.backends.base import ChatRequest
from gpumesh.daemon.async_generators import closing_iterator
from gpumesh.daemon.session import ChatStream, PromptRequest
from gpumesh.errors import MeshNotRunning, TunnelDown, UsageError, tunnel_error_from_code
from gpumesh.mesh.history import History, Recorder
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.default_model import choose_model
from gpumesh.state import MeshState, TunnelPhase
from gpumesh.tunnels.base import ExecChunk, Tunnel

# How long a prompt waits for the first node that can take it, when none can yet: a connect's own deadline and a probe.
USABLE_S = 12.0
AGAIN_S = 6.0  # for a tunnel that has failed already, and is tried once more
# Which models there are is known when every node has reported; how long a slow one may hold up a prompt without `-m`.
MODELS_S = 4.0


class LocalSession:
    """``mesh`` is entered already, and stays its owner's to close. Who keeps a history shows states to ``recorder``."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.recorder = Recorder()
        self._stopping = False

    def refuse_new_prompts(self) -> None:
        """The mesh stops: prompts that come now are told so, those that run may end."""
        self._stopping = True

    async def status(self) -> MeshState:
        return self.mesh.snapshot()

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        return await self.mesh.wait_first_report(timeout_s)

    async def watch(self, interval_s: float) -> AsyncGenerator[MeshState]:
        async with closing_iterator(self.mesh.watch_changes()) as changes:
            async for _ in changes:
                yield self.mesh.snapshot()
                await asyncio.sleep(interval_s)

    def chat(self, ask: PromptRequest) -> AbstractAsyncContextManager[ChatStream]:
        return self._chat(ask)

    @asynccontextmanager
    async def _chat(self, ask: PromptRequest) -> AsyncGenerator[ChatStream]:
        if self._stopping:
            raise MeshNotRunning("the mesh is stopping and takes no new prompts")
        self._check(ask.node)
        model = ask.model or await self._default_model(ask.node)
        await self.mesh.wait_usable(model, timeout_s=USABLE_S, node=ask.node)
        request = ChatRequest(model, ask.messages, ask.options, ask.stream, ask.think)
        async with self.mesh.chat(request, node=ask.node, priority=ask.priority, timeout_s=ask.timeout_s) as stream:
            yield stream

    async def _default_model(self, node: str | None) -> str:
        default = self.mesh.topology.gateway.default_model
        if default is not None:
            return default
        await self.mesh.wait_usable(None, timeout_s=USABLE_S, node=node)
        return choose_model(await self.mesh.wait_first_report(MODELS_S), node)

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        self._check(node)
        tunnel = await self._tunnel_up(node)
        async with closing_iterator(tunnel.exec_stream(argv)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _tunnel_up(self, node: str) -> Tunnel:
        """One that waits for its next try tries at once: a person is waiting. When that fails its reason is the
        answer. Raises TunnelError."""
        tunnel = self.mesh.tunnel(node)
        new = tunnel.state.state in (TunnelPhase.IDLE, TunnelPhase.CONNECTING)
        if not new:
            tunnel.retry_now()
        tried = False
        try:
            async with (
                asyncio.timeout(USABLE_S if new else AGAIN_S),
                closing_iterator(self.mesh.watch_changes()) as changes,
            ):
                async for _ in changes:
                    phase = tunnel.state.state
                    if phase is TunnelPhase.UP:
                        return tunnel
                    if tried and phase is not TunnelPhase.CONNECTING:
                        break
                    tried = tried or phase in (TunnelPhase.IDLE, TunnelPhase.CONNECTING)
        except TimeoutError:
            pass
        state = tunnel.state
        if state.last_error is None:
            raise TunnelDown("the tunnel is not up: it is still connecting", node=node)
        raise tunnel_error_from_code(state.error_code or "", state.last_error, hint=state.hint, node=node)

    async def drain(self, node: str) -> None:
        self._check(node)
        self.mesh.drain(node)

    async def resume(self, node: str) -> None:
        self._check(node)
        self.mesh.resume(node)

    async def reconnect(self, node: str) -> None:
        self._check(node)
        self.mesh.tunnel(node).retry_now()

    async def history(self) -> History:
        return self.recorder.history()

    def _check(self, node: str | None) -> None:
        names = [spec.name for spec in self.mesh.topology.nodes]
        if node is not None and node not in names:
            raise UsageError(f"there is no node {node!r}", hint=f"the nodes are: {', '.join(names)}")
