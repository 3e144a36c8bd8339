"""The parts of a running pool: a worker on each host that holds layers, and the head with llama-server.

``run`` of a part starts its tunnel and its program, and watches both until it is cancelled; then both have ended. When
one of them ends before, ``run`` raises the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from gpumesh.errors import GPUMeshError, PoolError, PoolFailed, PoolVersionsDiffer
from gpumesh.event_loop.async_iterators import closing_iterator
from gpumesh.mesh.mesh import Mesh
from gpumesh.pool_spec import NGRAM_DRAFT
from gpumesh.pools.base import MemberPlan
from gpumesh.pools.hosts.commands import LOOPBACK, WorkerAddress, llama_server_argv, nodes_by_endpoint, rpc_server_argv
from gpumesh.pools.hosts.guarded_program import GuardedProgram, run_guarded
from gpumesh.pools.hosts.head_log import HeadLog
from gpumesh.pools.hosts.route import HostRoute
from gpumesh.pools.hosts.rpc_hello import ask_rpc_version
from gpumesh.pools.hosts.worker_login import FORWARD_READY, WorkerLogin, forward_argv
from gpumesh.pools.running.members import MemberHost
from gpumesh.pools.running.planner import PreparedPool
from gpumesh.pools.running.silence import SilenceLimit
from gpumesh.pools.running.task_group import error_group
from gpumesh.pools.running.tunnel_watch import TunnelWatch, tunnel_up
from gpumesh.topology import DEFAULT_TUNNELS, BackendSpec, NodeSpec, Target
from gpumesh.tunnels.transport import ReverseForward

WORKER_START_S = 30.0  # a program for a GPU needs some seconds until it listens
HELLO_TIMEOUT_S = 5.0
HELLO_PAUSE_S = 0.1
STARTUP_SILENCE_S = 60.0  # for llama-server to say something, before it loads the model
# The same while it loads. Weights that reach a worker count, too; a host without ``ss`` does not tell of them.
LOAD_SILENCE_S = 900.0
SLOWEST_LOAD = 4.0  # times the planned time of a load
BLAME_S = 0.5  # llama-server ends when a worker is lost; so long the reason may come from the worker


@dataclass(frozen=True, slots=True)
class PartRoute:
    """How a part's host is used: ``route`` runs its program, and ``port`` of this machine leads to the program's port.
    ``watch`` knows when the tunnel is lost; ``None`` for this machine."""

    route: HostRoute
    port: int
    watch: TunnelWatch | None


@asynccontextmanager
async def open_route(
    mesh: Mesh, host: MemberHost, port: int, reverse_forwards: Sequence[ReverseForward] = ()
) -> AsyncIterator[PartRoute]:
    """Opens a tunnel to a host, for one part of a pool alone, that leads to ``port`` of the host's loopback. Raises
    TunnelError."""
    if host.is_here:
        yield PartRoute(host.route, port, None)
        return
    name, target = host.node.name, Target(LOOPBACK, port)
    # The node's name is kept: its host key is recorded under it.
    spec = NodeSpec(name, BackendSpec(targets=(target,)), ssh=host.node.ssh)
    watch = TunnelWatch(name)
    # Its local end is a port for this user alone, whatever mesh.yaml says: workers ask nobody for a password.
    topology = replace(mesh.topology, tunnels=DEFAULT_TUNNELS)
    tunnel = mesh.factory.make_tunnel(spec, topology, watch, reverse_forwards)
    local_port = urlsplit(tunnel.urls[target]).port
    assert local_port is not None, "a tunnel of a pool listens on TCP"
    async with tunnel_up(tunnel, name):
        yield PartRoute(tunnel, local_port, watch)


class PartEvents(Protocol):
    """Gets what happens to the parts, at the moment when it happens: before anything is ended."""

    def note_broken(self) -> None:
        """The pool can serve no request any more. Why is not known yet."""

    def note_failed(self, error: GPUMeshError) -> None:
        """A part has failed."""

    def note_log_line(self) -> None:
        """llama-server has written a line into its log."""


class Part:
    """What all parts have in common: a program on a host, and a tunnel to it. ``argv`` is the program's command, and
    ``port`` its port on the host."""

    def __init__(
        self,
        mesh: Mesh,
        host: MemberHost,
        events: PartEvents,
        *,
        argv: Sequence[str],
        port: int,
        reverse_forwards: Sequence[ReverseForward] = (),
    ) -> None:
        self.node = host.node.name
        self._mesh = mesh
        self._host = host
        self._events = events
        self._argv = argv
        self._port = port
        self._reverse_forwards = reverse_forwards
        self.ready_port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The port of this machine that leads to the part's program, as soon as the program is ready."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.node} {'READY' if self.ready_port.done() else 'STARTING'}>"

    async def run(self) -> None:
        """Runs the part until cancelled. Raises GPUMeshError when it has failed."""
        try:
            await self._run()
        except GPUMeshError as error:
            self._events.note_failed(error)
            raise

    async def _run(self) -> None:
        async with (
            open_route(self._mesh, self._host, self._port, self._reverse_forwards) as route,
            run_guarded(route.route, self._argv) as program,
            error_group() as group,
        ):
            group.create_task(self._fail_when_tunnel_lost(route))
            for work in self._watch(program, route.port):
                group.create_task(work)

    def _watch(self, program: GuardedProgram, port: int) -> Sequence[Coroutine[Any, Any, None]]:
        """What runs beside the program until it fails. ``port`` of this machine leads to the program's port."""
        raise NotImplementedError

    def _note_ready(self, port: int) -> None:
        if not self.ready_port.done():
            self.ready_port.set_result(port)

    async def _fail_when_tunnel_lost(self, route: PartRoute) -> None:
        if route.watch is not None:
            raise await route.watch.wait_lost()


class WorkerPart(Part):
    """ggml-rpc-server on the host of a member. ``port`` is its port there."""

    def __init__(
        self,
        mesh: Mesh,
        host: MemberHost,
        events: PartEvents,
        *,
        plan: MemberPlan,
        prepared: PreparedPool,
        port: int,
    ) -> None:
        argv = rpc_server_argv(plan, prepared.hosts.programs[plan.node], port)
        super().__init__(mesh, host, events, argv=argv, port=port)
        self._head_version = prepared.hosts.programs[prepared.spec.head].rpc

    def _watch(self, program: GuardedProgram, port: int) -> Sequence[Coroutine[Any, Any, None]]:
        return self._fail_when_ended(program), self._wait_ready(port)

    async def _wait_ready(self, port: int) -> None:
        version = None
        try:
            async with asyncio.timeout(WORKER_START_S):
                while version is None:
                    version = await ask_rpc_version(LOOPBACK, port, timeout_s=HELLO_TIMEOUT_S)
                    if version is None:
                        await asyncio.sleep(HELLO_PAUSE_S)
        except TimeoutError:
            message = f"the worker on {self.node} does not answer within {WORKER_START_S:g} s of its start"
            raise PoolFailed(message, node=self.node) from None
        if self._head_version is not None and version != self._head_version:
            own, head = (".".join(map(str, numbers)) for numbers in (version, self._head_version))
            raise PoolVersionsDiffer(
                f"the worker on {self.node} speaks version {own} of the RPC protocol, and the head's host has {head}",
                hint="install the same build of llama.cpp on all members",
                node=self.node,
            )
        self._note_ready(port)

    async def _fail_when_ended(self, program: GuardedProgram) -> None:
        end = await program.wait_ended()
        raise PoolFailed(f"the worker on {self.node} {end.describe()}", node=self.node)


class HeadPart(Part):
    """llama-server on the head's host. ``port`` is its port there. ``workers`` are the addresses of the workers as the
    head sees them; ``reverse_forwards`` make them."""

    def __init__(
        self,
        mesh: Mesh,
        host: MemberHost,
        events: PartEvents,
        *,
        prepared: PreparedPool,
        port: int,
        workers: Sequence[WorkerAddress],
        reverse_forwards: Sequence[ReverseForward],
    ) -> None:
        files = prepared.hosts
        argv = llama_server_argv(
            prepared.plan,
            files.programs[host.node.name],
            model_path=files.model.path,
            workers=workers,
            port=port,
            alias=prepared.spec.served_name,
            draft_path=None if files.draft is None else files.draft.path,
            drafts_by_ngram=prepared.spec.draft == NGRAM_DRAFT,
        )
        super().__init__(mesh, host, events, argv=argv, port=port, reverse_forwards=reverse_forwards)
        self.log = HeadLog(nodes_by_endpoint(workers))
        self._load_silence_s = max(LOAD_SILENCE_S, SLOWEST_LOAD * (prepared.plan.load_s or 0.0))
        self._silence = SilenceLimit()

    def _watch(self, program: GuardedProgram, port: int) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._follow_log(program, port),)

    async def _follow_log(self, program: GuardedProgram, port: int) -> None:
        """Reads llama-server's log to its end, and raises why it has ended."""
        log = self.log
        async with closing_iterator(program.lines()) as lines:
            while (line := await self._next_line(lines)) is not None:
                log.feed(line)
                self._events.note_log_line()
                if log.is_ready:
                    self._note_ready(port)
                elif log.error is not None:
                    raise self._name_node(log.error)
        await self._explain_end(program)

    def note_life(self) -> None:
        """Weights have reached a worker."""
        self._silence.note_life()

    async def _next_line(self, lines: AsyncIterator[str]) -> str | None:
        """The next line of the log; ``None`` after the last. Raises PoolFailed if llama-server starts and says nothing
        for too long: it waits without a limit for a worker that does not answer."""
        silence_s = None if self.log.is_ready else self._load_silence_s if self.log.is_loading else STARTUP_SILENCE_S
        try:
            return await self._silence.read_line(lines, silence_s)
        except TimeoutError:
            raise PoolFailed(f"llama-server on {self.node} has said nothing for {silence_s:g} s") from None

    async def _explain_end(self, program: GuardedProgram) -> None:
        end = await program.wait_ended()
        error = PoolFailed(f"llama-server on {self.node} {end.describe(self.log.last_error_line)}")
        self._events.note_broken()
        await asyncio.sleep(BLAME_S)
        raise self._name_node(self.log.error or self.log.effect or error)

    def _name_node(self, error: PoolError) -> PoolError:
        if self.log.error is not None and error.node is None and error.needs_person:
            error.node = self.node
        return error


class WayPart(Part):
    """ssh on the head's host, which leads ``head_port`` of its loopback straight to a worker's port."""

    def __init__(
        self,
        mesh: Mesh,
        host: MemberHost,
        events: PartEvents,
        *,
        login: WorkerLogin,
        head_port: int,
        worker_port: int,
    ) -> None:
        argv = forward_argv(login, head_port=head_port, worker_port=worker_port)
        super().__init__(mesh, host, events, argv=argv, port=head_port)
        self._worker = login.node

    def _watch(self, program: GuardedProgram, port: int) -> Sequence[Coroutine[Any, Any, None]]:
        del port  # it is the head that connects to the way's port
        return (self._follow(program),)

    async def _follow(self, program: GuardedProgram) -> None:
        try:
            async with asyncio.timeout(WORKER_START_S) as scope:
                async for line in program.lines():
                    if line.strip() == FORWARD_READY:
                        self._note_ready(self._port)
                        scope.reschedule(None)
        except TimeoutError:
            raise PoolFailed(f"ssh from {self.node} to {self._worker} does not connect", node=self._worker) from None
        end = await program.wait_ended()
        raise PoolFailed(f"ssh from {self.node} to {self._worker} {end.describe()}", node=self._worker)
