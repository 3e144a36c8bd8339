"""``Mesh`` (``gpumesh.Mesh``), the library's main class: opens all nodes of a mesh.yaml, and sends requests to them.

::

    async with Mesh.from_file("mesh.yaml") as mesh:
        async for chunk in mesh.chat("qwen2.5:7b", "Why is the sky blue?"):
            print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

from gpumesh import audit, config
from gpumesh.backends.base import ChatRequest, HttpCall, Message
from gpumesh.balancer.base import Candidate, Demand, Priority
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.balancer.outcomes import Outcome
from gpumesh.balancer.scheduling.scheduler import Scheduler
from gpumesh.coordination.factory import create_coordination
from gpumesh.mesh import readiness
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.chat import ChatStream, chat_demand, read_request
from gpumesh.mesh.dispatch import Dispatcher
from gpumesh.mesh.inspection.regular_inspection import RegularInspection
from gpumesh.mesh.learned_state import LearnedState
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.node_changes import AppliedChange, plan_nodes, replace_pool_node, with_pool_nodes
from gpumesh.mesh.nodes.node_factory import NodeFactory
from gpumesh.mesh.request_counters import RequestCounters
from gpumesh.mesh.requests.answer import Answer, SendProgress
from gpumesh.mesh.requests.delivery import RequestDelivery
from gpumesh.mesh.requests.send_context import SendContext
from gpumesh.mesh.requests.upload import upload
from gpumesh.mesh.requests.upstream import Upstream
from gpumesh.mesh.running_nodes import RunningNodes
from gpumesh.mesh.shared_places import SharedPlaces
from gpumesh.mesh.sharing.factory import make_prompt_hasher, share_fleet
from gpumesh.probes.http_client import make_http_client
from gpumesh.state import Finding, GatewayState, MeshState, compute_totals
from gpumesh.topology import BackendKind, NodeSpec, Topology
from gpumesh.tunnels.base import ExecResult, Tunnel
from gpumesh.tunnels.supervisor import Prompter
from gpumesh.tunnels.workers.worker_pool import WorkerPool

MAX_SHOWN_WAITING = 100  # waiting requests in a snapshot


class Mesh:
    """A running mesh, as an async context manager. On entry the tunnels start to open, all at the same time.

    ``clock`` returns monotonic seconds. ``prompter`` passes the questions of hosts on to a person; ``None``: there is
    no person to ask. ``learned`` keeps what is learned about the servers over a restart; ``None``: nothing is kept.

    The class is the public interface of the package. The fleet, the dispatcher and the delivery do the work.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
        prompter: Prompter | None = None,
        learned: LearnedState | None = None,
    ) -> None:
        self.topology = self.file_topology = topology  # with and without the nodes of running pools
        config.withhold_variables(topology.secret_variables)
        self.model_rules = ModelRules(topology.models)
        self.prompt_hasher = make_prompt_hasher(topology)
        self.gateway = GatewayState()
        self._own_findings: dict[str, tuple[Finding, ...]] = {}
        self._clock = clock
        self._rng = rng or Random()
        self._learned = learned
        self._changes = ChangeNotifier()
        self.request_counters = RequestCounters(on_end=self._changes.notify)
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._nodes: RunningNodes | None = None  # while the mesh runs
        self._upstream = Upstream()
        self._http = make_http_client()
        self._coordination = create_coordination(
            topology.redis, mesh=topology.name, on_change=self._on_places_changed, clock=clock
        )
        gateway, pinned = topology.gateway, self.model_rules.pinned
        self._scheduler = Scheduler(gateway.policy, rng=self._rng, max_queue=gateway.max_queue, pinned=pinned)
        self.factory = NodeFactory(
            clock=clock,
            rng=self._rng,
            http=self._http,
            changes=self._changes,
            scheduler=self._scheduler,
            coordination=self._coordination,
            rules=self.model_rules,
            learned=learned,
            prompter=prompter,
            on_slot_freed=self._grant_waiting,
            on_changed=self._on_node_changed,
            on_gpus_identified=self._regroup,
        )
        self.fleet = Fleet(map(self.factory.make_node, topology.nodes), clock=clock)
        enabled = [node for node in self.fleet if node.spec.enabled]
        self._inspection = RegularInspection(enabled, self._http, clock=clock, on_report=self._changes.notify)
        has_others = topology.redis is not None
        places = SharedPlaces(self.fleet, self._scheduler, self._coordination, clock=clock) if has_others else None
        self._dispatcher = Dispatcher(self.fleet, self._scheduler, clock=clock, places=places)
        self._sharing = share_fleet(topology, self.fleet, self.factory, self.prompt_hasher, self._count_requests)
        self._send_context = SendContext(self._upstream, self._dispatcher, clock, self._rng, self.fleet.explain_no_node)

    def __repr__(self) -> str:
        counters = self.request_counters
        return f"<Mesh {self.topology.name} {counters.in_flight} in flight, {counters.served} served, {self.fleet!r}>"

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> Mesh:
        """The mesh of a mesh.yaml file; ``None``: the file that the command line would find. Raises ConfigError with
        all problems."""
        return cls(config.load(Path(path) if path is not None else None))

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            await stack.enter_async_context(self._upstream)
            self.factory.workers = await stack.enter_async_context(WorkerPool())
            group = await stack.enter_async_context(asyncio.TaskGroup())
            self._nodes = RunningNodes(self.fleet, self._inspection, self.factory, group)
            stack.callback(self._stop)  # on exit this runs first: the task group then waits for the cancelled tasks
            self._tasks.append(group.create_task(self._coordination.run(), name="coordination"))
            self._tasks.append(group.create_task(self._sharing.run(), name="facts for other gateways"))
            self._nodes.start(self.topology)
            self._tasks.append(group.create_task(self._inspection.run(), name="inspection"))
            if self._learned is not None:
                self._tasks.append(group.create_task(self._learned.run(self.fleet), name="learned state"))
            self._stack = stack.pop_all()  # nothing has failed here, so only ``__aexit__`` closes it all
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            # The task group would wrap the block's error in an ExceptionGroup; the caller gets the error as it is.
            await self._stack.aclose()
        else:
            await self._stack.__aexit__(kind, error, trace)

    def _on_places_changed(self, keys: Collection[str]) -> None:
        """Other gateways have changed what they have on the GPUs of these keys."""
        self._dispatcher.note_places_changed(keys)
        self._changes.notify()

    def _stop(self) -> None:
        self._dispatcher.close()
        if self._nodes is not None:
            self._nodes.stop()
        for task in self._tasks:
            task.cancel()

    # The nodes get these methods, because they are made before the dispatcher and the fleet.
    def _grant_waiting(self) -> None:
        self._dispatcher.grant_waiting()

    def _regroup(self) -> None:
        self.fleet.regroup()

    def _on_node_changed(self) -> None:
        self._dispatcher.note_nodes_changed()
        self._sharing.note_changes()

    def _count_requests(self) -> tuple[int, int]:
        return self.in_flight, self._dispatcher.queued

    def apply(self, topology: Topology, *, limit_s: float) -> AppliedChange:
        """Takes over another topology while the mesh runs, at once. Requests go on where they are; those on nodes that
        end may do so for ``limit_s`` seconds, and then move to other nodes. The address of Redis cannot be changed.

        Raises OSError and GPUMeshError if a tunnel cannot be made; then nothing has changed."""
        change = self._apply_nodes(with_pool_nodes(topology, self.topology), limit_s=limit_s)
        running, self.file_topology = self.file_topology, topology
        config.withhold_variables(topology.secret_variables)
        if topology.models != running.models:
            self.model_rules.replace(topology.models)
            for node in self.fleet:
                node.apply_model_rules()
        gateway, pinned = topology.gateway, self.model_rules.pinned
        self._scheduler.change_settings(gateway.policy, max_queue=gateway.max_queue, pinned=pinned)
        self._dispatcher.note_nodes_changed()
        self._changes.notify()
        return change

    def set_pool_node(self, name: str, node: NodeSpec | None, *, limit_s: float) -> None:
        """Lets the running pool ``name`` serve as ``node``; ``None``: no more, as a node that ``apply`` closes."""
        self._apply_nodes(replace_pool_node(self.topology, name, node), limit_s=limit_s)
        self._dispatcher.note_nodes_changed()
        self._changes.notify()

    def _apply_nodes(self, topology: Topology, *, limit_s: float) -> AppliedChange:
        """Carries out the changes of the nodes. Returns the reopened nodes, and the requests that closed nodes still
        have."""
        assert self._nodes is not None, "the mesh does not run"
        plan = plan_nodes(self.topology, topology)
        closed = self._nodes.apply(plan, topology, limit_s=limit_s)
        self.topology = topology
        self._send_context.forget_nodes(plan.closed)
        return AppliedChange(plan.reopened, {node.name: node.ledger.held for node in closed if node.ledger.held})

    # -- the state -----------------------------------------------------------------------------------------------

    def snapshot(self) -> MeshState:
        """The state of the mesh now, for people and programs."""
        dispatcher = self._dispatcher
        merge = self._inspection.merge
        states = tuple(merge(node.state(dispatcher.queued_for(node.name))) for node in self.fleet)
        findings = (*audit.collect_findings(self.topology, states), *self.fleet.leaving_findings())
        return MeshState(
            mesh=self.topology.name,
            at=datetime.now(UTC),
            gateway=replace(
                self.gateway,
                in_flight=self.in_flight,
                queued=dispatcher.queued,
                waiting=dispatcher.waiting(MAX_SHOWN_WAITING),
            ),
            totals=compute_totals(states),
            nodes=states,
            findings=(*findings, *self._coordination.findings(), *self.own_findings),
            gateways=self._sharing.gateways(),
        )

    @property
    def in_flight(self) -> int:
        """The number of requests that were accepted and have not ended, without the requests that wait for a slot."""
        return max(self.request_counters.in_flight - self._dispatcher.queued, 0)

    def watch_changes(self) -> AsyncIterator[None]:
        """Yields at once, and then when something has changed since the last iteration."""
        return self._changes.watch()

    def set_gateway_state(self, gateway: GatewayState) -> None:
        """Stores the state that the gateway over this mesh reports, for ``snapshot``."""
        self.gateway = gateway
        self._changes.notify()

    @property
    def own_findings(self) -> tuple[Finding, ...]:
        """The findings about the mesh itself, of the code that runs it."""
        return tuple(finding for findings in self._own_findings.values() for finding in findings)

    def set_own_findings(self, findings: tuple[Finding, ...], subject: str = "file") -> None:
        """Stores the findings about a part of the mesh, in place of the earlier ones about it, for ``snapshot``."""
        if findings != self._own_findings.get(subject, ()):
            self._own_findings[subject] = findings
            self._changes.notify()

    async def wait_first_report(self, timeout_s: float) -> MeshState:
        """Returns the state as soon as every node was probed or is known to be out of reach, at the latest after
        ``timeout_s``."""
        await readiness.wait_first_report(self.fleet, timeout_s)
        return self.snapshot()

    async def wait_usable(self, model: str | None = None, *, timeout_s: float, node: str | None = None) -> str:
        """Waits until a node can serve this model, and returns the node's name.

        A fallback of the model will do as well. Raises NoNodeError or ModelMissing as soon as it is known that no node
        will, or after ``timeout_s``.
        """
        demands = self.model_rules.plan_models(Demand(model=model, node=self.fleet.require_known(node)))
        return await readiness.wait_any_usable(
            self.fleet, self._dispatcher, self._changes, demands, timeout_s=timeout_s
        )

    def candidates(self) -> tuple[Candidate, ...]:
        """All nodes, as the balancer sees them now."""
        return tuple(self.fleet.candidates())

    def usable_nodes(self, kinds: frozenset[BackendKind] = frozenset(BackendKind)) -> tuple[str, ...]:
        """The names of the nodes of these kinds that take requests now, or as soon as they have a free slot."""
        candidates = self.fleet.candidates()
        return tuple(candidate.name for candidate in candidates if candidate.usable and candidate.kind in kinds)

    def local_ports(self) -> frozenset[int]:
        """The ports of this machine behind which a node's server answers."""
        return self.fleet.local_ports()

    @property
    def attempt_outcomes(self) -> dict[str, Mapping[Outcome, int]]:
        """For each node, the number of attempts that took a slot there, by the outcome of the attempt."""
        return self.fleet.attempt_outcomes

    # -- requests ------------------------------------------------------------------------------------------------

    def send(
        self,
        demand: Demand,
        calls: HttpCall | Mapping[BackendKind, HttpCall],
        *,
        timeout_s: float,
        resume: bool = True,
        at_most_once: bool = False,
        try_reserve_memory: Callable[[int], bool] = lambda _: True,
        progress: SendProgress | None = None,
    ) -> Coroutine[None, None, Answer]:
        """Sends a request to the best node. If this node fails, sends the request to other nodes until a node answers.

        - ``calls`` holds the request in the form of each kind of server, or in one form for all kinds. Each server gets
          the name under which it lists the model.
        - ``resume``: if an answer is cut while it streams, another node continues it.
        - ``at_most_once``: the request changes something. It is never sent again after a server may have begun to work
          on it.
        - ``try_reserve_memory`` reserves a number of bytes until the answer ends, and returns whether there is room.
          Memory is needed to continue an answer.
        - ``progress`` is kept up to date, and adds up what several calls with it have needed.

        An error that is the client's own fault, or that every node gave, is returned as an Answer with its status.
        Raises NoNodeError, ModelMissing, QueueFull and DeadlineExceeded.
        """
        delivery = RequestDelivery(
            self._send_context,
            self.model_rules.apply(demand) if self.topology.models else demand,
            calls,
            timeout_s=timeout_s,
            resume=resume,
            at_most_once=at_most_once,
            try_reserve_memory=try_reserve_memory,
            progress=progress,
            counters=self.request_counters if demand.needs_slot else None,  # a request to a model store is not counted
        )
        return delivery.deliver()

    async def upload(self, node: str, path: str, body: AsyncIterable[bytes], *, timeout_s: float) -> Answer:
        """Sends a body to this node by POST. The body can be read only once, so the request is sent only once. Raises
        the errors of ``send``, and BackendUnreachable."""
        started_at = self._clock()
        demand = Demand(None, node=self.fleet.require_known(node), needs_slot=False)
        lease = await self._dispatcher.acquire(demand, timeout_s=timeout_s)
        return await upload(self._http, lease, path, body, timeout_s=timeout_s - (self._clock() - started_at))

    def chat(
        self,
        request: ChatRequest | str,
        messages: str | Iterable[Message | Mapping[str, Any]] = (),
        *,
        node: str | None = None,
        priority: Priority = Priority.NORMAL,
        session: str | None = None,
        timeout_s: float | None = None,
        resume: bool = True,
    ) -> ChatStream:
        """Starts a chat. ``request`` is the name of a model, with ``messages``, or a whole ChatRequest. A text as
        ``messages`` is one message of the user; others are dictionaries with ``role`` and ``content``, or objects.
        ``timeout_s`` is by default ``gateway.timeout_s`` of mesh.yaml. Raises TypeError and ValueError for messages of
        another form.

        The result yields the chunks of the answer as they come. It is also an async context manager: an early exit
        stops the generation on the host. If an answer is cut, another node continues it, unless ``resume`` is false.
        The first iteration raises the errors of ``send``, and BackendStatus for a request that the server refuses.
        """
        request = read_request(request, messages)
        node = self.fleet.require_known(node)
        demand = chat_demand(request, self.prompt_hasher, node=node, priority=priority, session=session)
        demands = self.model_rules.plan_models(demand)
        return ChatStream(self.send, request, demands, timeout_s or self.topology.gateway.timeout_s, resume=resume)

    # -- nodes ---------------------------------------------------------------------------------------------------

    async def exec(self, node: str, argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        """Runs a command on a node's host. Raises UsageError for an unknown or disabled node, TunnelDown and
        ExecError."""
        return await self.tunnel(node).exec(argv, timeout_s=timeout_s)

    def tunnel(self, node: str) -> Tunnel:
        """The node's tunnel. Raises UsageError for a node that mesh.yaml does not have or that is disabled in it."""
        return self.fleet.find_tunnel(node)

    async def refresh(self, nodes: Iterable[str]) -> None:
        """Probes the servers of these nodes again, because their model stores were changed through us."""
        names = frozenset(nodes)  # a node may have left the mesh meanwhile
        await asyncio.gather(*(node.refresh() for node in self.fleet if node.name in names))

    def drain(self, node: str) -> None:
        """Sends no new requests to this node. The running requests end by themselves."""
        self.fleet.drain(node)

    def resume(self, node: str) -> None:
        """Ends the draining of this node, whoever asked for it: it gets new requests again."""
        self.fleet.resume(node)
