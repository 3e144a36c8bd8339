"""``LocalSession``: the operations of a mesh that runs in this process: status, chat, exec, drain, reconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from gpumesh.backends.base import ChatRequest
from gpumesh.config.comparison import ConfigSnapshot
from gpumesh.config.live_changes import ReloadReport
from gpumesh.daemon.sessions.session import PromptAnswer, PromptRequest
from gpumesh.errors import MeshNotRunning, TunnelDown, UsageError, tunnel_error_from_code, unknown_node
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.history import History, Recorder
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.models.default_model import choose_model
from gpumesh.mesh.outages.out_of_service import take_out_of_service
from gpumesh.mesh.outages.outage import Outage
from gpumesh.mesh.requests.answer import Answer
from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import PoolPhase, PoolPlan, PoolState
from gpumesh.pools.running.manager import PoolManager
from gpumesh.pools.running.planner import PoolPlanner
from gpumesh.state import MeshState, TunnelPhase
from gpumesh.tunnels.base import ExecChunk, Tunnel

# The time that a prompt waits for the first usable node: enough for one connect and one probe together.
FIRST_NODE_TIMEOUT_S = 12.0
RECONNECT_TIMEOUT_S = 6.0  # for a tunnel that has failed before and tries once more
# The default model is chosen when every node has reported. A slow node may hold up a prompt without `-m` for this long.
FIRST_REPORT_TIMEOUT_S = 4.0
_TRYING_PHASES = (TunnelPhase.IDLE, TunnelPhase.CONNECTING)  # the phases before the first result and during an attempt


class MeshFile(Protocol):
    """The mesh.yaml of a running mesh (``daemon/reload/``)."""

    @property
    def snapshot(self) -> ConfigSnapshot:
        """What the mesh has taken over from the file."""

    def request(self) -> None:
        """Requests a reload, without waiting for its result."""

    async def reload(self) -> ReloadReport:
        """As ``Session.reload``."""


class LocalSession:
    """The Session over ``mesh``, which is open already. The owner of the mesh closes it, and adds its states to
    ``recorder``, from which ``history`` comes. ``file`` is the mesh.yaml; ``None``: the mesh was not made from a file,
    or nobody will compare it with the file. ``pool_manager`` runs the pools; ``None``: they can only be planned.
    ``planner`` plans them."""

    def __init__(
        self,
        mesh: Mesh,
        file: MeshFile | None = None,
        pool_manager: PoolManager | None = None,
        planner: PoolPlanner | None = None,
    ) -> None:
        self.mesh = mesh
        self.file = file
        self.pool_manager = pool_manager
        self._planner = planner or PoolPlanner(mesh)
        self.recorder = Recorder()
        self.on_answer_end: Callable[[Answer], None] | None = None  # gets each prompt's answer when it has ended
        self._stopping = False  # no new prompts are taken

    def __repr__(self) -> str:
        topology = self.mesh.topology
        state = "STOPPING" if self._stopping else "RUNNING"
        return f"<LocalSession {topology.name} {state} {len(topology.nodes)} nodes>"

    def refuse_new_prompts(self) -> None:
        """Lets each new prompt fail with the error that the mesh is stopping. Prompts in flight go on."""
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

    def chat(self, prompt: PromptRequest) -> AbstractAsyncContextManager[PromptAnswer]:
        return self._open_chat(prompt)

    @asynccontextmanager
    async def _open_chat(self, prompt: PromptRequest) -> AsyncGenerator[PromptAnswer]:
        """Sends the prompt through the mesh, and yields its answer. Waits until a node can serve the model."""
        if self._stopping:
            raise MeshNotRunning("the mesh is stopping and takes no new prompts")
        self._require_node(prompt.node)
        model = prompt.model or await self._default_model(prompt.node)
        await self.mesh.wait_usable(model, timeout_s=FIRST_NODE_TIMEOUT_S, node=prompt.node)
        request = ChatRequest(model, prompt.messages, prompt.options, prompt.stream, prompt.think)
        chat = self.mesh.chat(
            request,
            node=prompt.node,
            priority=prompt.priority,
            session=prompt.session,
            timeout_s=prompt.timeout_s,
        )
        try:
            async with chat as stream:
                yield stream
        finally:
            if chat.answer is not None and self.on_answer_end is not None:
                self.on_answer_end(chat.answer)

    async def _default_model(self, node: str | None) -> str:
        """Returns the model for a prompt that names none: mesh.yaml's default model, or a choice among all models.

        Waits for the nodes first if it has to choose. ``node`` limits the choice to one node.
        """
        default = self.mesh.topology.gateway.default_model
        if default is not None:
            return default
        await self.mesh.wait_usable(None, timeout_s=FIRST_NODE_TIMEOUT_S, node=node)
        return choose_model(await self.mesh.wait_first_report(FIRST_REPORT_TIMEOUT_S), node)

    async def exec(self, node: str, argv: Sequence[str]) -> AsyncGenerator[ExecChunk]:
        self._require_node(node)
        tunnel = await self._wait_tunnel_up(node)
        async with closing_iterator(tunnel.exec_stream(argv)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _wait_tunnel_up(self, node: str) -> Tunnel:
        """Returns the node's tunnel when it is up. A tunnel that waits for its next attempt connects at once, because a
        person is waiting. Raises TunnelError with the reason when the attempt fails or takes too long."""
        tunnel = self.mesh.tunnel(node)
        is_trying = tunnel.state.state in _TRYING_PHASES
        if not is_trying:
            tunnel.retry_now()  # a tunnel that is up only checks its connection
        attempt_seen = False  # until an attempt is seen, BACKOFF or FAILED is the result of an earlier attempt
        try:
            async with (
                asyncio.timeout(FIRST_NODE_TIMEOUT_S if is_trying else RECONNECT_TIMEOUT_S),
                closing_iterator(self.mesh.watch_changes()) as changes,
            ):
                async for _ in changes:
                    phase = tunnel.state.state
                    if phase is TunnelPhase.UP:
                        return tunnel
                    if phase in _TRYING_PHASES:
                        attempt_seen = True
                    elif attempt_seen:
                        break
        except TimeoutError:
            pass  # the tunnel's state has the reason
        state = tunnel.state
        if state.last_error is None:
            raise TunnelDown("the tunnel is not up: it is still connecting", node=node)
        error_code = state.error_code or ""  # an empty code gives a plain TunnelError
        raise tunnel_error_from_code(error_code, state.last_error, hint=state.hint, node=node)

    async def drain(self, node: str) -> None:
        self._require_node(node)
        self.mesh.drain(node)

    async def resume(self, node: str) -> None:
        self._require_node(node)
        self.mesh.resume(node)

    def hold(self, node: str, outage: Outage) -> AbstractAsyncContextManager[None]:
        self._require_node(node)
        return take_out_of_service(self.mesh, node, outage)

    async def reconnect(self, node: str) -> None:
        self._require_node(node)
        self.mesh.tunnel(node).retry_now()

    async def configuration(self) -> ConfigSnapshot:
        snapshot = ConfigSnapshot(self.mesh.file_topology) if self.file is None else self.file.snapshot
        return replace(snapshot, pool_nodes=tuple(node for node in self.mesh.topology.nodes if node.pool_members))

    async def reload(self) -> ReloadReport:
        if self.file is None:
            raise UsageError("this mesh was not made from a file that it could read again")
        return await self.file.reload()

    async def history(self) -> History:
        return self.recorder.history()

    async def plan_pool(self, spec: PoolSpec) -> PoolPlan:
        return await self._planner.plan(spec)

    async def start_pool(self, name: str) -> AsyncGenerator[PoolState]:
        async with closing_iterator(self._require_pools().start(name)) as states:
            async for state in states:
                yield state

    async def stop_pool(self, name: str) -> None:
        await self._require_pools().stop(name)

    async def pools(self) -> tuple[PoolState, ...]:
        if self.pool_manager is not None:
            return self.pool_manager.states()
        specs = self.mesh.topology.pools
        return tuple(PoolState(spec.name, spec.served_name, PoolPhase.STOPPED) for spec in specs)

    def _require_pools(self) -> PoolManager:
        """Raises MeshNotRunning for a mesh that ends with its command: a pool must not."""
        if self.pool_manager is None:
            raise MeshNotRunning("a pool runs in a mesh in the background, and none runs for this configuration")
        return self.pool_manager

    def _require_node(self, node: str | None) -> None:
        """Raises UsageError when the mesh has no such node. ``None`` stands for any node."""
        names = [spec.name for spec in self.mesh.topology.nodes]
        if node is not None and node not in names:
            raise unknown_node(node, names)
