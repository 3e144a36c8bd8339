"""The running whole: all nodes, the balancer over them, and requests sent through it. ``gpumesh.Mesh``.

::

    async with Mesh.from_file("mesh.yaml") as mesh:
        async for chunk in mesh.chat("qwen2.5:7b", "Why is the sky blue?"):
            print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from gpumesh import audit, config
from gpumesh.backends.base import ChatRequest, HttpCall, Message
from gpumesh.balancer.base import Candidate, Demand, Priority
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.select import no_node_error, select_candidates
from gpumesh.coordination.base import Coordination
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.errors import DeadlineExceeded, GPUMeshError, NoNodeError, UsageError
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.chat import ChatStream
from gpumesh.mesh.dispatch import GRACE_S, Dispatcher
from gpumesh.mesh.nodes.node import Node
from gpumesh.mesh.requests.answer import Answer, WholeAnswer
from gpumesh.mesh.requests.delivery import RequestDelivery, SendContext
from gpumesh.mesh.requests.upload import upload
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.probes.http_client import http_client
from gpumesh.state import Finding, GatewayState, MeshState, Severity, compute_totals
from gpumesh.topology import BackendKind, NodeSpec, RedisSpec, Topology
from gpumesh.tunnels.base import ExecResult, Tunnel
from gpumesh.tunnels.direct.this_machine import ThisMachine
from gpumesh.tunnels.supervisor import Prompter, open_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool

SHOWN_WAITING = 100


@dataclass(slots=True)
class RequestCounters:
    """Every request that was accepted ends in exactly one of the other three."""

    accepted: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def in_flight(self) -> int:
        return self.accepted - self.served - self.failed - self.cancelled


class Mesh:
    """Use as an async context manager; inside it the tunnels open by themselves, side by side.

    ``clock`` gives monotonic seconds, ``ask`` answers what a host wants to know from a person (``None``: nobody is
    there to be asked).
    """

    def __init__(
        self,
        topology: Topology,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
        prompter: Prompter | None = None,
    ) -> None:
        self.topology = topology
        config.withhold_variables(topology.secret_variables)
        self.request_counters = RequestCounters()
        self.gateway = GatewayState()
        self._clock = clock
        self._rng = rng or Random()
        self._ask = prompter
        self._changes = ChangeNotifier()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._here = ThisMachine()
        self._upstream = Upstream()
        self._coordination = self._coordinated(topology.redis)
        shared = None if isinstance(self._coordination, SingleGateway) else self._coordination.other_gateways_load
        self._http = http_client()
        self._nodes = {
            spec.name: Node(
                spec,
                clock=clock,
                http=self._http,
                changes=self._changes,
                on_slot_freed=self._freed,
                on_gpus_identified=self._regroup,
                other_gateways_load=shared,
            )
            for spec in topology.nodes
        }
        self._dispatcher = Dispatcher(
            self._nodes, topology.gateway.policy, clock=clock, rng=self._rng, max_queue=topology.gateway.max_queue
        )
        self._means = SendContext(self._upstream, self._dispatcher, clock, self._rng, self._why_none)

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> Mesh:
        """The mesh of a mesh.yaml, found as the command line finds it. Raises ConfigError with all problems."""
        return cls(config.load(Path(path) if path is not None else None))

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            await stack.enter_async_context(self._upstream)
            workers = await stack.enter_async_context(WorkerPool())
            group = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(self._stop)
            if not isinstance(self._coordination, SingleGateway):
                self._tasks.append(group.create_task(self._coordination.run(), name="other gateways"))
                self._tasks.append(group.create_task(self._tell_others(), name="telling other gateways"))
            for node in self._nodes.values():
                if node.spec.enabled:
                    tunnel = node.tunnel = self._open(node.spec, node, workers)  # there before its task has run
                    self._tasks.append(group.create_task(node.run(tunnel), name=f"node {node.name}"))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            # The task group would wrap what the block raised in an ExceptionGroup; its caller gets it as it is.
            await self._stack.aclose()
        else:
            await self._stack.__aexit__(kind, error, trace)

    def _open(self, spec: NodeSpec, node: Node, workers: WorkerPool) -> Tunnel:
        return open_tunnel(
            spec,
            clock=self._clock,
            rng=self._rng,
            workers=workers,
            on_change=node.on_tunnel,
            prompter=self._ask,
            this_machine=self._here,
            tunnels_spec=self.topology.tunnels,
            mesh_name=self.topology.name,
        )

    def _coordinated(self, spec: RedisSpec | None) -> Coordination:
        if spec is None:
            return SingleGateway()
        from gpumesh.coordination.redis_coordination import RedisCoordination  # a client that most meshes do not need

        variable = spec.password_env
        return RedisCoordination(
            spec.url,
            password=lambda: None if variable is None else config.read_secret(variable),
            on_change=self._others_changed,
            clock=self._clock,
        )

    async def _tell_others(self) -> None:
        async for _ in self.watch_changes():
            loads: dict[str, int] = {}
            for node in self._nodes.values():
                loads[node.coordination_key] = loads.get(node.coordination_key, 0) + node.in_flight
            self._coordination.publish_loads(loads)

    def _others_changed(self) -> None:
        self._dispatcher.grant_waiting()
        self._changes.notify()

    def _stop(self) -> None:
        self._dispatcher.close()
        for task in self._tasks:
            task.cancel()

    def _freed(self) -> None:
        self._dispatcher.grant_waiting()

    def _regroup(self) -> None:
        """Nodes that share a GPU are balanced as one from the moment at which that is known."""
        groups = audit.gpu_groups([node.state(0) for node in self._nodes.values()])
        first: set[str] = set()
        for node in self._nodes.values():
            node.group = groups.get(node.name, node.name)
            node.counts_for_group = node.group not in first
            first.add(node.group)

    # -- what is seen --------------------------------------------------------------------------------------------

    def snapshot(self) -> MeshState:
        states = tuple(
            node.state(self._dispatcher.queued_for(node.name) if self._dispatcher.queued else 0)
            for node in self._nodes.values()
        )
        return MeshState(
            mesh=self.topology.name,
            at=datetime.now(UTC),
            gateway=GatewayState(
                self.gateway.url,
                self.gateway.state,
                in_flight=self.in_flight,
                queued=self._dispatcher.queued,
                waiting=self._dispatcher.waiting(SHOWN_WAITING),
                socket=self.gateway.socket,
                access=self.gateway.access,
            ),
            totals=compute_totals(states),
            nodes=states,
            findings=(*audit.collect_findings(self.topology, states), *self._alone()),
        )

    def _alone(self) -> Iterator[Finding]:
        problem = self._coordination.problem
        if problem is not None:
            message = f"other gateways are not heard, this one goes on alone: Redis: {problem}"
            yield Finding("redis-away", Severity.WARNING, None, message, "check that `redis.url` is right and answers")

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and have not ended, those that wait for a place left out."""
        return max(self.request_counters.in_flight - self._dispatcher.queued, 0)

    def watch_changes(self) -> AsyncIterator[None]:
        """Yields at once and then after each change; what happened in between is coalesced."""
        return self._changes.watch()

    def set_gateway_state(self, gateway: GatewayState) -> None:
        """What the gateway over this mesh says about itself, for ``snapshot``."""
        self.gateway = gateway
        self._changes.notify()

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        """The state once every node was probed or found out of reach, or the deadline passed."""
        waits = [node.wait_reported() for node in self._nodes.values()]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*waits)
        except TimeoutError:
            pass  # what is known by then is the report
        return self.snapshot()

    async def wait_usable(self, model: str | None = None, *, timeout_s: float, node: str | None = None) -> str:
        """The name of the first node that can serve this model, as soon as one can.

        Raises NoNodeError or ModelMissing once it is known that none will, or when the deadline has passed. Nodes that
        were lost only just now are waited for as those of a request in the queue are.
        """
        demand = Demand(model=model, node=self._known(node))
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(until) as limit:
                async for _ in self.watch_changes():
                    now = self._clock()
                    candidates = [entry.candidate(now) for entry in self._nodes.values()]
                    found = select_candidates(candidates, demand)
                    if found.free or found.busy:
                        return (found.free or found.busy)[0].name
                    if not all(entry.reported for entry in self._nodes.values() if demand.node in (None, entry.name)):
                        continue
                    if not self._dispatcher.worth_waiting(demand):
                        raise self._why_none(demand)
                    until = min(until, loop.time() + GRACE_S)
                    limit.reschedule(until)
        except TimeoutError:
            pass
        raise self._why_none(demand)

    def candidates(self) -> tuple[Candidate, ...]:
        """Every node, as the balancer sees it now."""
        now = self._clock()
        return tuple(node.candidate(now) for node in self._nodes.values())

    def usable_nodes(self, kinds: frozenset[BackendKind] = frozenset(BackendKind)) -> tuple[str, ...]:
        """The names of the nodes of these kinds that take work now, or would when they have a free place."""
        return tuple(entry.name for entry in self.candidates() if entry.usable and entry.kind in kinds)

    def local_ports(self) -> frozenset[int]:
        """The ports of this machine behind which a node's server answers: the ends of tunnels, and servers of its own.
        What comes from there is a host's word, though its address is this machine's."""
        tunnels = [node.tunnel for node in self._nodes.values() if node.tunnel is not None]
        places = [urlsplit(url) for tunnel in tunnels for url in tunnel.urls.values()]
        return frozenset(
            place.port for place in places if place.port is not None and config.is_loopback(place.hostname or "")
        )

    async def refresh(self, nodes: Iterable[str]) -> None:
        """Asks these nodes' servers anew what they have: their store was changed through us. Raises nothing."""
        await asyncio.gather(*(self._node(name).refresh() for name in nodes))

    def _why_none(self, demand: Demand) -> GPUMeshError:
        now = self._clock()
        error = no_node_error([node.candidate(now) for node in self._nodes.values()], demand)
        if type(error) is not NoNodeError:
            return error
        states = [node.state(0) for node in self._nodes.values() if demand.node in (None, node.name)]
        reasons = "; ".join(f"{state.name}: {state.reason or 'no answer yet'}" for state in states)
        return NoNodeError(f"{error.message} ({reasons})" if reasons else error.message, hint=error.hint)

    # -- requests ------------------------------------------------------------------------------------------------

    async def send(
        self,
        demand: Demand,
        calls: Mapping[BackendKind, HttpCall],
        *,
        timeout_s: float,
        resume: bool = True,
        at_most_once: bool = False,
        try_reserve_memory: Callable[[int], bool] = lambda _: True,
    ) -> Answer:
        """Sends a request to the best node, to others while nodes fail it, until one answers; an answer that is cut
        while it streams is continued by another node, unless ``resume`` is false. ``at_most_once``: it changes
        something, and is never given to a server again that may have begun to work on it.

        ``try_reserve_memory`` says whether so many bytes more may be held until the answer ends: to continue it takes
        some. ``calls`` holds the request as each kind of server wants it. An error that is the client's own, or that
        every node gave, is an Answer with its status. Raises NoNodeError, ModelMissing, QueueFull and DeadlineExceeded.
        """
        sending = RequestDelivery(
            self._means,
            demand,
            calls,
            timeout_s=timeout_s,
            resume=resume,
            at_most_once=at_most_once,
            try_reserve_memory=try_reserve_memory,
        )
        if not demand.needs_slot:
            return await sending.deliver()
        self.request_counters.accepted += 1
        try:
            answer = await sending.deliver()
        except asyncio.CancelledError:
            self._ended(Outcome.CLIENT_GONE)
            raise
        except BaseException:
            self._ended(Outcome.UNREACHABLE)
            raise
        if isinstance(answer, WholeAnswer):
            self._ended(Outcome.SERVED if answer.status < 500 else Outcome.SERVER_ERROR)
        else:
            answer.on_outcome = self._ended
        return answer

    def _ended(self, outcome: Outcome) -> None:
        if outcome in (Outcome.SERVED, Outcome.CLIENT_ERROR):
            self.request_counters.served += 1
        elif outcome is Outcome.CLIENT_GONE:
            self.request_counters.cancelled += 1
        else:
            self.request_counters.failed += 1
        self._changes.notify()

    async def upload(self, node: str, path: str, body: AsyncIterable[bytes], *, timeout_s: float) -> Answer:
        """Posts a body that can be read only once to this node. Raises what ``send`` raises, and BackendUnreachable."""
        began = self._clock()
        lease = await self._dispatcher.acquire(
            Demand(None, node=self._known(node), needs_slot=False), timeout_s=timeout_s
        )
        return await upload(self._http, lease, path, body, timeout_s=timeout_s - (self._clock() - began))

    def chat(
        self,
        request: ChatRequest | str,
        messages: str | Sequence[Message] = (),
        *,
        node: str | None = None,
        priority: Priority = Priority.NORMAL,
        session: str | None = None,
        timeout_s: float | None = None,
        resume: bool = True,
    ) -> ChatStream:
        """A chat with a model; the answer's chunks as they come. Also an async context manager: leaving it early
        stops the generation on the host. A cut answer is continued by another node, unless ``resume`` is false.

        Raises, at the first step, what ``send`` raises, and BackendStatus for a request that the server refuses.
        """
        if isinstance(request, str):
            said = (Message("user", messages),) if isinstance(messages, str) else tuple(messages)
            request = ChatRequest(request, said)
        demand = Demand(model=request.model, node=self._known(node), priority=priority, session=session)
        timeout_s = timeout_s or self.topology.gateway.timeout_s
        return ChatStream(self.send, request, demand, timeout_s, resume=resume)

    # -- nodes ---------------------------------------------------------------------------------------------------

    async def exec(self, node: str, argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        """Runs a command on a node's host. Raises TunnelDown and ExecError."""
        return await self.tunnel(node).exec(argv, timeout_s=timeout_s)

    def tunnel(self, node: str) -> Tunnel:
        """Raises UsageError for a node that mesh.yaml does not have or that is disabled in it."""
        tunnel = self._node(node).tunnel
        if tunnel is None:
            raise UsageError(f"node {node!r} is disabled in mesh.yaml")
        return tunnel

    @property
    def attempt_outcomes(self) -> dict[str, Mapping[Outcome, int]]:
        """For each node, how the tries that took a place there ended."""
        return {node.name: node.attempt_outcomes for node in self._nodes.values()}

    def drain(self, node: str) -> None:
        """No new work to this node; what runs there ends by itself."""
        self._node(node).draining = True
        self._freed()
        self._changes.notify()

    def resume(self, node: str) -> None:
        self._node(node).draining = False
        self._freed()
        self._changes.notify()

    def _node(self, name: str) -> Node:
        self._known(name)
        return self._nodes[name]

    def _known(self, name: str | None) -> str | None:
        if name is not None and name not in self._nodes:
            raise UsageError(f"there is no node {name!r}", hint=f"the nodes are: {', '.join(self._nodes)}")
        return name


__all__ = ["DeadlineExceeded", "Mesh", "RequestCounters"]
