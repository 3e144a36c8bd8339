"""One node while the mesh runs: its tunnel, its probe loops, and the books of what is in flight on it.

All of it lives on one event loop; nothing here blocks. What a node is worth to the balancer is ``candidate``, what
people see is ``state``; both are built from the last reports and the books, without I/O.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256

import httpx

from gpumesh import audit, config
from gpumesh.backends.base import ParallelismSource, ServerCounters
from gpumesh.backends.dialects import DIALECTS
from gpumesh.balancer.base import Candidate, Demand
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.limits import ParallelLimit, learn_limit
from gpumesh.balancer.outcomes import Outcome, rule_for_outcome
from gpumesh.balancer.select import full_name
from gpumesh.errors import SecretMissing
from gpumesh.mesh.change_notifier import ChangeNotifier
from gpumesh.mesh.nodes.rate_meter import RateMeter, Smoothed
from gpumesh.probes.backend import BackendReport, probe_backend
from gpumesh.probes.health import assess_health as judge_health
from gpumesh.probes.nvidia_smi import GpuReport, probe_gpus
from gpumesh.probes.smi_tables import OUTPUT_BYTES
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    Health,
    HostState,
    LoadState,
    NodeState,
    RouteState,
    Severity,
    TunnelPhase,
    TunnelState,
)
from gpumesh.topology import NodeSpec, Target
from gpumesh.tunnels.base import Tunnel
from gpumesh.tunnels.stagger import stagger_intervals

BACKEND_EVERY_S = 2.0
BACKEND_TIMEOUT_S = 4.0
GPUS_EVERY_S = 2.0
GPUS_TIMEOUT_S = 5.0
LOAD_COUNTS_MS = 200.0  # a model that was in memory says a load_duration of some ms as well
SESSIONS = 256
LONGEST_KEY = 400  # eight GPUs
QUIET_S = 2.0  # nvidia-smi averages over up to a second: its figure is foreign only so long after our last request

Clock = Callable[[], float]


class Lease:
    """A place on a node. Released exactly once, whatever happens; ``abort_callback`` is set by whoever uses it, and
    forgotten when it is released: a request and all that it holds must not have to wait for the garbage collector.

    ``concurrent``: how many were in flight there when it was given, itself included. ``connection_number`` numbers the
    tunnel's connection over which it goes. ``can_move`` tells, until the answer has begun, whether another node could
    give it instead.
    """

    __slots__ = (
        "_released",
        "abort_callback",
        "aborted",
        "can_move",
        "concurrent",
        "connection_number",
        "model",
        "node",
    )

    def __init__(self, node: Node, model: str | None, beside: int) -> None:
        self.node = node
        self.connection_number = node.connection_count
        self.model = model
        self.concurrent = beside
        self.abort_callback: Callable[[], None] | None = None
        self.can_move: Callable[[], bool] | None = None
        self.aborted = False
        self._released = False

    def release(self, outcome: Outcome, *, counters: ServerCounters | None = None, error: str | None = None) -> None:
        if not self._released:
            self._over()
            self.node.settle_lease(self, outcome, counters, error)

    @property
    def released(self) -> bool:
        return self._released

    def mark_answer_started(self) -> None:
        """Its answer has begun: after failures the node need not wait for its end to be given more."""
        self.can_move = None
        self.node.mark_answer_started()

    def discard(self) -> None:
        """It was never used: nothing is counted."""
        if not self._released:
            self._over()
            self.node.discard_lease(self)

    def set_abort_callback(self, abort: Callable[[], None]) -> None:
        """What ``abort_attempt`` does from now on until it is released."""
        if not self._released:
            self.abort_callback = abort

    def _over(self) -> None:
        self._released = True
        self.abort_callback = self.can_move = None

    def abort_attempt(self) -> None:
        """The way to the node is gone: ends the attempt at once, rather than at some time-out."""
        self.aborted = True
        if self.abort_callback is not None:
            self.abort_callback()


class Node:
    """``freed`` is called whenever a place may have become free or a node usable; ``identified`` when the GPUs that
    it has turn out to be others than was known. ``attempt_outcomes`` counts how those that took a place ended."""

    def __init__(
        self,
        spec: NodeSpec,
        *,
        clock: Clock,
        http: httpx.AsyncClient,
        changes: ChangeNotifier,
        on_slot_freed: Callable[[], None],
        on_gpus_identified: Callable[[], None],
        other_gateways_load: Callable[[str], int] | None = None,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.kind = spec.backend.kind
        self.dialect = DIALECTS[self.kind]
        self.group = spec.name
        self.counts_for_group = True
        """Whether it is the first of its group, which counts what others have in flight on their GPU."""
        self.tunnel: Tunnel | None = None
        self.draining = False
        self.connection_count = 0
        """How many connections its tunnel has had so far."""
        self._clock = clock
        self._http = http
        self._changes = changes
        self._freed = on_slot_freed
        self._identified = on_gpus_identified
        self._elsewhere = other_gateways_load
        self._tunnel_state = TunnelState(transport="direct" if spec.ssh is None else spec.ssh.transport.value)
        self._up = asyncio.Event()
        self._probe_now = asyncio.Event()
        self._probing = asyncio.Lock()
        self._reported = asyncio.Event()
        self._gpus: GpuReport | None = None
        self._backend: BackendReport | None = None
        self._backend_failures = 0
        self._secret_problem: SecretMissing | None = None
        self._marks: frozenset[str] = frozenset()
        self._models: frozenset[str] | None = None
        self._loaded: frozenset[str] = frozenset()
        self._target: Target | None = None
        self._leases: set[Lease] = set()
        self._aside: set[Lease] = set()
        self._breaker = Breaker()
        self._limit = ParallelLimit()
        self._rates = Smoothed()
        self._loads = Smoothed()
        self._sessions: dict[str, None] = {}
        self._foreign: float | None = None
        self._last_busy = clock()
        self._served = self._failed = self._cancelled = 0
        self._last_failure: str | None = None
        self.attempt_outcomes: Counter[Outcome] = Counter()
        self.meter = RateMeter(clock)
        if not spec.enabled:
            self._reported.set()

    # -- lifetime ------------------------------------------------------------------------------------------------

    async def run(self, tunnel: Tunnel) -> None:
        """Until cancelled: the tunnel and both probe loops."""
        self.tunnel = tunnel
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tunnel.run(), name=f"tunnel {self.name}")
            tasks.create_task(self._probe_backend_often(), name=f"backend of {self.name}")
            tasks.create_task(self._probe_gpus_often(), name=f"gpus of {self.name}")

    def on_tunnel(self, state: TunnelState) -> None:
        """The tunnel's callback for each change of its state."""
        was_up = self._tunnel_state.state is TunnelPhase.UP
        self._tunnel_state = state
        if state.state is TunnelPhase.UP:
            if not was_up:
                self.connection_count += 1
                # Not when it was lost: what was cut with the old way counts as failed only a moment later.
                self._breaker = Breaker()
                self._up.set()
                self._probe_now.set()
        else:
            self._up.clear()
            if was_up:
                # The host behind the new connection may be another one: what it has and can do is asked anew.
                self._backend = None
                self._gpus = None
                for lease in (*self._leases, *self._aside):
                    lease.abort_attempt()
        if state.state in (TunnelPhase.BACKOFF, TunnelPhase.FAILED):
            self._reported.set()
        self._freed()
        self._changes.notify()

    @property
    def reported(self) -> bool:
        """Whether the first round is over: probed once, or found to be out of reach."""
        return self._reported.is_set()

    async def wait_reported(self) -> None:
        await self._reported.wait()

    # -- probes --------------------------------------------------------------------------------------------------

    async def _probe_backend_often(self) -> None:
        for wait_s in stagger_intervals(self.name, BACKEND_EVERY_S):
            await self._up.wait()
            self._probe_now.clear()
            async with self._probing:
                await self._probe_backend()
            try:
                async with asyncio.timeout(wait_s):
                    await self._probe_now.wait()
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Returns when the server was asked once more what it has, from now on and not before."""
        async with self._probing:
            if self._up.is_set():
                await self._probe_backend()

    async def _probe_backend(self) -> None:
        assert self.tunnel is not None, "the loops run beside the tunnel"
        urls = self.tunnel.urls
        candidates = [(target, urls[target]) for target in self.spec.backend.targets if target in urls]
        try:
            key = self.api_key()
        except SecretMissing as error:
            self._secret_problem = error
            self._reported.set()
            self._changes.notify()
            return
        report = await probe_backend(
            self._http,
            self.spec.backend,
            [url for _, url in candidates],
            api_key=key,
            timeout_s=BACKEND_TIMEOUT_S,
            node=self.name,
        )
        if not self._up.is_set():
            return  # the answer is about a way that is gone
        if report.state.state is BackendPhase.UP:
            self._backend_failures = 0
        else:
            self._backend_failures += 1
            if self._backend is not None and self._backend_failures == 1 and self._leases:
                # A server that is busy prefilling may miss one probe; what it is doing for us says that it lives.
                self._probe_now.set()
                return
        was_down = self._backend is not None and self._backend.state.state is not BackendPhase.UP
        self._backend = report
        if was_down and report.state.state is BackendPhase.UP:
            self._breaker = Breaker()  # it was away and is back: what failed before is over
        self._target = next((target for target, url in candidates if url == report.url), None)
        if report.state.state is BackendPhase.UP:
            names = report.state.models
            self._models = frozenset(names) | frozenset(full_name(name) for name in names)
            self._loaded = frozenset(full_name(loaded.name) for loaded in report.state.loaded)
        else:
            self._let_go()
        if self._gpus is not None or report.state.state is BackendPhase.UP:
            self._reported_when_complete()
        self._recognise()
        self._freed()
        self._changes.notify()

    def _let_go(self) -> None:
        """The server does not answer our probes. Who still waits for its first word is served elsewhere, if anybody
        could, rather than at its deadline: a process that hangs closes no connection."""
        for lease in list(self._leases):
            if lease.can_move is not None and lease.can_move():
                lease.abort_attempt()

    async def _probe_gpus_often(self) -> None:
        for wait_s in stagger_intervals(self.name, GPUS_EVERY_S):
            await self._up.wait()
            assert self.tunnel is not None, "the loops run beside the tunnel"
            quiet = not self._leases and self._clock() - self._last_busy > QUIET_S
            ask = partial(self.tunnel.exec, shareable=True, limit_bytes=OUTPUT_BYTES)
            report = await probe_gpus(ask, timeout_s=GPUS_TIMEOUT_S, node=self.name)
            if self._up.is_set():
                self._gpus = report
                self._recognise()
                if quiet and not self._leases:
                    used = [gpu.utilization_pct for gpu in report.gpus if gpu.utilization_pct is not None]
                    self._foreign = max(used) / 100.0 if used else None
                self._reported_when_complete()
                self._changes.notify()
            await asyncio.sleep(wait_s)

    def _recognise(self) -> None:
        """Who shares a GPU with whom is asked again when what this node is known by has changed."""
        known = audit.identifying_marks(self.state(0))
        if known != self._marks:
            self._marks = known
            self._identified()

    def _reported_when_complete(self) -> None:
        if self._gpus is not None and self._backend is not None:
            self._reported.set()

    def api_key(self) -> str | None:
        """The backend's key, read from its variable at each use and kept nowhere. Raises SecretMissing."""
        variable = self.spec.backend.api_key_env
        return None if variable is None else config.read_secret(variable, node=self.name)

    # -- the balancer's view -------------------------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        return (
            self._tunnel_state.state is TunnelPhase.UP
            and self._backend is not None
            and self._backend.state.state is BackendPhase.UP
        )

    def is_same_connection(self, lease: Lease) -> bool:
        """Whether the tunnel's connection is still the one over which this lease went. What was lost with a
        connection is no sign of the server. A direct node has none that could be lost apart from its server."""
        if self.spec.ssh is None:
            return True
        return lease.connection_number == self.connection_count and self._tunnel_state.state is TunnelPhase.UP

    @property
    def may_recover(self) -> bool:
        """Not reachable now, but it may well be in a moment: connecting, or lost only just now."""
        if self.draining:
            return False
        if self.reachable:
            return not self._breaker.allows(self._clock())
        state = self._tunnel_state
        if state.state is TunnelPhase.UP:
            return self._backend is None
        return state.state in (TunnelPhase.IDLE, TunnelPhase.CONNECTING) or (
            state.state is TunnelPhase.BACKOFF and self._models is not None
        )

    def limit(self, now: float) -> int | None:
        if self.spec.backend.max_parallel is not None:
            return self.spec.backend.max_parallel
        if self.dialect.parallelism is ParallelismSource.PROBE:
            return self._backend.inventory.parallel if self._backend and self._backend.inventory else None
        return self._limit.max_in_flight(now)

    def candidate(self, now: float, *, despite_breaker: bool = False) -> Candidate:
        return Candidate(
            name=self.name,
            kind=self.kind,
            usable=self.reachable and not self.draining and (despite_breaker or self._breaker.allows(now)),
            models=self._models,
            loaded=self._loaded,
            in_flight=len(self._leases),
            queued=self._elsewhere(self.coordination_key)
            if self._elsewhere is not None and self.counts_for_group
            else 0,
            limit=self.limit(now),
            weight=self.spec.weight,
            group=self.group,
            tokens_per_s=self._rates.values,
            load_s=self._loads.values,
            foreign_load=self._foreign,
            rtt_ms=self._tunnel_state.rtt_ms,
            sessions=self._sessions.keys(),
        )

    @property
    def coordination_key(self) -> str:
        """What it uses, in a name that is the same for every gateway that reaches it: its GPUs, else its place."""
        if self._gpus is not None and self._gpus.gpus:
            uuids = "+".join(sorted(gpu.uuid for gpu in self._gpus.gpus))
            # All nodes' keys are one message: one that shows many GPUs must not make it longer than is read.
            return uuids if len(uuids) <= LONGEST_KEY else f"gpus:{sha256(uuids.encode()).hexdigest()}"
        ssh, target = self.spec.ssh, self._target or self.spec.backend.targets[0]
        return f"{ssh.host}:{ssh.port}/{target.url}" if ssh is not None else target.url

    @property
    def in_flight(self) -> int:
        return len(self._leases)

    @property
    def base_url(self) -> str:
        """Where requests go, without a slash at the end. Only while ``reachable``."""
        assert self._backend is not None
        assert self._backend.url is not None
        return self._backend.url

    @property
    def target(self) -> Target | None:
        """The same place as its own host knows it: what the Host header must say (facts/ollama-api.md)."""
        return self._target

    # -- books ---------------------------------------------------------------------------------------------------

    def lease(self, demand: Demand) -> Lease:
        model = None if demand.model is None else full_name(demand.model)
        lease = Lease(self, model, len(self._leases) + 1)
        (self._leases if demand.needs_slot else self._aside).add(lease)
        self._breaker = self._breaker.record_start(self._clock())
        if demand.session is not None:
            self._sessions.pop(demand.session, None)
            self._sessions[demand.session] = None
            while len(self._sessions) > SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
        self._changes.notify()
        return lease

    def settle_lease(self, lease: Lease, outcome: Outcome, counters: ServerCounters | None, error: str | None) -> None:
        """Called by ``Lease.release``, once for each."""
        now = self._clock()
        counts = lease in self._leases
        self._leases.discard(lease)
        self._aside.discard(lease)
        self._last_busy = now
        self.attempt_outcomes[outcome] += counts
        verdict = rule_for_outcome(outcome)
        if outcome is Outcome.SERVED:
            self._served += counts
            self._breaker = self._breaker.record_success()
            if counters is not None:
                self._learn(lease, counters, now)
        elif verdict.counts_against_node and (counts or outcome is not Outcome.SERVER_ERROR):
            # A 500 to what is no inference is about a model store (Ollama's answer to a copy that cannot be), and says
            # nothing of how it generates.
            self._failed += counts
            self._last_failure = error
            self._breaker = self._breaker.record_failure(now)
            self._probe_now.set()
        else:
            if outcome is Outcome.CLIENT_GONE:
                self._cancelled += counts
            self._breaker = self._breaker.cancel_trial()
        if verdict.check_tunnel and self.tunnel is not None:
            self.tunnel.suspect(error or outcome.value)
        self._freed()
        self._changes.notify()

    def forgive_failure(self) -> None:
        """A failure that counted against it was not its fault: another node failed at the same request."""
        self._breaker = self._breaker.forgive_failure(self._clock())
        self._freed()
        self._changes.notify()

    def mark_answer_started(self) -> None:
        """A request's answer has begun: while it goes on another may try as well."""
        if self._breaker.trial_in_flight:
            self._breaker = self._breaker.cancel_trial()
            self._freed()

    def discard_lease(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self._aside.discard(lease)
        self._breaker = self._breaker.cancel_trial()
        self._freed()
        self._changes.notify()

    def _learn(self, lease: Lease, counters: ServerCounters, now: float) -> None:
        if self.spec.backend.max_parallel is None and self.dialect.parallelism is ParallelismSource.DURATIONS:
            self._limit = learn_limit(
                self._limit,
                waited_ms=counters.waited_ms,
                total_ms=counters.total_ms,
                concurrent=lease.concurrent,
                now=now,
            )
        if lease.model is None:
            return
        if counters.tokens_per_s is not None and (counters.tokens or 0) >= 4:
            self._rates.add(lease.model, counters.tokens_per_s)
        if counters.load_ms is not None and counters.load_ms > LOAD_COUNTS_MS:
            self._loads.add(lease.model, counters.load_ms / 1000.0)
        self._loaded |= {lease.model}

    # -- what people see -----------------------------------------------------------------------------------------

    @property
    def tunnel_state(self) -> TunnelState:
        return self._tunnel_state if self.tunnel is None else self.tunnel.state

    def state(self, queued: int) -> NodeState:
        tunnel = self.tunnel_state
        backend = self._backend_state(tunnel)
        health, reason = judge_health(tunnel, self._gpus, self._backend, self.spec, self.draining)
        if not self.spec.enabled:
            health, reason = Health.UNKNOWN, "disabled in mesh.yaml"
        elif self._secret_problem is not None and self._backend is None:
            health, reason = Health.DOWN, self._secret_problem.message
        gpus = self._gpus
        return NodeState(
            name=self.name,
            health=health,
            reason=reason,
            tunnel=tunnel,
            backend=backend,
            host=HostState() if gpus is None else HostState(gpus.hostname, gpus.driver),
            gpus=None if gpus is None or gpus.error is not None else gpus.gpus,
            load=LoadState(
                in_flight=len(self._leases),
                queued=queued,
                limit=self._shown_limit(),
                served=self._served,
                failed=self._failed,
                cancelled=self._cancelled,
            ),
            labels=tuple(sorted(self.spec.labels.items())),
            simulated=backend.version is not None and backend.version.endswith("-lab"),
            routes=self._routes(),
            noticed=self._noticed(tunnel),
        )

    def _routes(self) -> tuple[RouteState, ...]:
        urls = {} if self.tunnel is None else self.tunnel.urls
        via = self._tunnel_state.transport
        return tuple(
            RouteState(target.url, urls[target], via) for target in self.spec.backend.targets if target in urls
        )

    def _shown_limit(self) -> int | None:
        if self.spec.backend.max_parallel is not None or self.dialect.parallelism is ParallelismSource.PROBE:
            return self.limit(self._clock())
        return self._limit.proven if self._served else None

    def _backend_state(self, tunnel: TunnelState) -> BackendState:
        if self._backend is None or tunnel.state is not TunnelPhase.UP:
            missing = self._secret_problem
            return BackendState(kind=self.kind.value, last_error=None if missing is None else missing.message)
        rate = self.meter.rate()
        return replace(self._backend.state, tokens_per_s=rate if rate or self._served else None)

    def _noticed(self, tunnel: TunnelState) -> tuple[Finding, ...]:
        """What the last probes noticed by themselves; audit's rules add what follows from the spec."""
        if tunnel.state is not TunnelPhase.UP:
            return ()
        found = self._gpus.findings if self._gpus is not None else ()
        if self._backend is not None:
            return (*found, *self._backend.findings)
        if self._secret_problem is not None:
            missing = self._secret_problem
            return (*found, Finding(missing.code, Severity.ERROR, self.name, missing.message, missing.hint))
        return found
