"""A node's ledger: the leases that are out, the breaker, the learned limit and rates, and the counts of how attempts
ended.

A lease is a slot on a node for one attempt. All of this runs on the mesh's event loop, without I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from gpumesh.backends.base import ParallelismSource, ServerCounters
from gpumesh.backends.dialects import find_dialect
from gpumesh.balancer.base import Demand
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.limits import ParallelLimit, learn_limit
from gpumesh.balancer.outcomes import Outcome, rule_for_outcome
from gpumesh.mesh.nodes.rate_meter import RateMeter, Smoothed
from gpumesh.model_names import full_name
from gpumesh.state import TunnelState
from gpumesh.topology import BackendKind, BackendSpec, Target
from gpumesh.tunnels.base import Tunnel

MIN_LOAD_MS = 200.0  # a model that is in memory already reports a load_duration of some ms, too
MAX_SESSIONS = 256
MIN_RATE_TOKENS = 4  # an answer of fewer tokens says little about tokens/s


class LeasedNode(Protocol):
    """What a request knows of the node on which it holds a lease."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> BackendKind: ...

    @property
    def meter(self) -> RateMeter: ...

    @property
    def uses_ssh(self) -> bool:
        """Whether requests reach the server over a connection that can be lost apart from the server."""

    @property
    def base_url(self) -> str:
        """Where requests go, without a slash at the end. Only while ``reachable``."""

    @property
    def target(self) -> Target | None:
        """The server as its own host knows it: what the Host header must name."""

    @property
    def reachable(self) -> bool:
        """Whether the tunnel is up and the server answered its last probe."""

    @property
    def tunnel(self) -> Tunnel | None: ...

    @property
    def tunnel_state(self) -> TunnelState: ...

    @property
    def connection_count(self) -> int:
        """How many connections its tunnel has had so far."""

    def api_key(self) -> str | None:
        """The server's API key. Raises SecretMissing."""

    def is_same_connection(self, lease: Lease) -> bool:
        """Whether the connection over which this lease was sent is still the tunnel's connection."""

    def forgive_failure(self) -> None:
        """Takes back a failure that was counted against the node: it was the request's fault."""


class Lease:
    """A slot on a node. It is released exactly once, whatever happens.

    ``concurrent`` counts the leases that were out when this one was given, itself included. ``connection_number`` is
    the number of the tunnel's connection that it uses. ``can_move`` tells, until the answer has begun, whether another
    node could give the answer instead. ``abort_callback`` is set by the attempt that uses the lease. Both are dropped
    at the release: they hold the request, which must not wait for the garbage collector.
    """

    __slots__ = (
        "_ledger",
        "_released",
        "abort_callback",
        "aborted",
        "can_move",
        "concurrent",
        "connection_number",
        "model",
        "node",
    )

    def __init__(self, node: LeasedNode, ledger: Ledger, model: str | None, concurrent: int) -> None:
        self.node = node
        self.connection_number = node.connection_count
        self.model = model
        self.concurrent = concurrent
        self.abort_callback: Callable[[], None] | None = None
        self.can_move: Callable[[], bool] | None = None
        self.aborted = False
        self._ledger = ledger
        self._released = False

    def __repr__(self) -> str:
        phase = "released" if self._released else "aborted" if self.aborted else "held"
        return f"<Lease {self.node.name} {phase} model {self.model} connection {self.connection_number}>"

    @property
    def released(self) -> bool:
        return self._released

    def release(self, outcome: Outcome, *, counters: ServerCounters | None = None, error: str | None = None) -> None:
        """Gives the slot back and counts the outcome. A second call does nothing."""
        if not self._released:
            self._mark_released()
            self._ledger.settle(self, outcome, counters, error)

    def discard(self) -> None:
        """Gives back a slot that was never used: nothing is counted."""
        if not self._released:
            self._mark_released()
            self._ledger.discard(self)

    def _mark_released(self) -> None:
        self._released = True
        self.abort_callback = self.can_move = None

    def mark_answer_started(self) -> None:
        """From now on no other node can give the answer, and a half-open breaker may let the next trial through."""
        self.can_move = None
        self._ledger.end_trial_early()

    def set_abort_callback(self, abort: Callable[[], None]) -> None:
        """Sets what ``abort_attempt`` does until the release."""
        if not self._released:
            self.abort_callback = abort

    def abort_attempt(self) -> None:
        """Ends the attempt at once, since the connection to the node is lost, rather than at some time-out."""
        self.aborted = True
        if self.abort_callback is not None:
            self.abort_callback()


class Ledger:
    """Gives out the leases of one node and keeps account of them.

    ``on_slot_freed`` is called when a slot may have become free, ``on_change`` when a figure has changed,
    ``on_failure`` with outcome and reason when an attempt failed by the node's fault, and ``on_model_loaded`` with a
    model that has just answered, and so is in the server's memory.
    """

    def __init__(
        self,
        spec: BackendSpec,
        *,
        clock: Callable[[], float],
        on_slot_freed: Callable[[], None],
        on_change: Callable[[], None],
        on_failure: Callable[[Outcome, str | None], None],
        on_model_loaded: Callable[[str], None],
    ) -> None:
        self.breaker = Breaker()
        self.learned_limit = ParallelLimit()
        self.rates = Smoothed()
        """Tokens/s by model."""
        self.load_times = Smoothed()
        """Seconds that loading took, by model."""
        self.sessions: dict[str, None] = {}
        """The sessions whose requests came here last, the oldest first."""
        self.served = self.failed = self.cancelled = 0
        self.attempt_outcomes: Counter[Outcome] = Counter()
        """How the attempts that took a slot ended."""
        self.last_release_at = clock()
        dialect = find_dialect(spec.kind)
        learns_from_durations = dialect is None or dialect.parallelism is ParallelismSource.DURATIONS
        self._learns_limit = spec.max_parallel is None and learns_from_durations
        self._clock = clock
        self._on_slot_freed = on_slot_freed
        self._on_change = on_change
        self._on_failure = on_failure
        self._on_model_loaded = on_model_loaded
        self._slot_leases: set[Lease] = set()
        self._slotless_leases: set[Lease] = set()

    def __repr__(self) -> str:
        phase = self.breaker.phase(self._clock()).value
        return (
            f"<Ledger {self.in_flight} in flight, {self.served} served, {self.failed} failed, "
            f"{self.cancelled} cancelled, breaker {phase}>"
        )

    @property
    def in_flight(self) -> int:
        """Leases that take a slot and are out."""
        return len(self._slot_leases)

    def lease(self, node: LeasedNode, demand: Demand) -> Lease:
        model = None if demand.model is None else full_name(demand.model)
        lease = Lease(node, self, model, len(self._slot_leases) + 1)
        (self._slot_leases if demand.needs_slot else self._slotless_leases).add(lease)
        self.breaker = self.breaker.record_start(self._clock())
        if demand.session is not None:
            self._remember_session(demand.session)
        self._on_change()
        return lease

    def _remember_session(self, session: str) -> None:
        self.sessions.pop(session, None)
        self.sessions[session] = None
        while len(self.sessions) > MAX_SESSIONS:
            self.sessions.pop(next(iter(self.sessions)))

    # -- the end of a lease --------------------------------------------------------------------------------------

    def settle(self, lease: Lease, outcome: Outcome, counters: ServerCounters | None, error: str | None) -> None:
        """Called by ``Lease.release``, once for each lease."""
        now = self._clock()
        has_slot = lease in self._slot_leases
        self._remove(lease)
        self.last_release_at = now
        self.attempt_outcomes[outcome] += has_slot
        if outcome is Outcome.SERVED:
            self.served += has_slot
            self.breaker = self.breaker.record_success()
            if counters is not None:
                self._learn(lease, counters, now)
        elif _is_node_failure(outcome, has_slot=has_slot):
            self.failed += has_slot
            self.breaker = self.breaker.record_failure(now)
            self._on_failure(outcome, error)
        else:
            if outcome is Outcome.CLIENT_GONE:
                self.cancelled += has_slot
            self.breaker = self.breaker.cancel_trial()
        self._announce_free_slot()

    def discard(self, lease: Lease) -> None:
        """Called by ``Lease.discard``, once for each lease."""
        self._remove(lease)
        self.breaker = self.breaker.cancel_trial()
        self._announce_free_slot()

    def _remove(self, lease: Lease) -> None:
        self._slot_leases.discard(lease)
        self._slotless_leases.discard(lease)

    def _announce_free_slot(self) -> None:
        self._on_slot_freed()
        self._on_change()

    def _learn(self, lease: Lease, counters: ServerCounters, now: float) -> None:
        if self._learns_limit:
            self.learned_limit = learn_limit(
                self.learned_limit,
                waited_ms=counters.waited_ms,
                total_ms=counters.total_ms,
                concurrent=lease.concurrent,
                now=now,
            )
        if lease.model is None:
            return
        if counters.tokens_per_s is not None and (counters.tokens or 0) >= MIN_RATE_TOKENS:
            self.rates.add(lease.model, counters.tokens_per_s)
        if counters.load_ms is not None and counters.load_ms > MIN_LOAD_MS:
            self.load_times.add(lease.model, counters.load_ms / 1000.0)
        self._on_model_loaded(lease.model)

    # -- the breaker ---------------------------------------------------------------------------------------------

    def reset_breaker(self) -> None:
        """Forgets all failures: the connection or the server is a new one."""
        self.breaker = Breaker()

    def forgive_failure(self) -> None:
        """Takes back one failure: another node failed at the same request, so it was the request's fault."""
        self.breaker = self.breaker.forgive_failure(self._clock())
        self._announce_free_slot()

    def end_trial_early(self) -> None:
        """The answer of a trial has begun: another request may be tried without waiting for the answer's end."""
        if self.breaker.trial_in_flight:
            self.breaker = self.breaker.cancel_trial()
            self._on_slot_freed()

    # -- aborting ------------------------------------------------------------------------------------------------

    def abort_all_attempts(self) -> None:
        """The connection to the node is lost."""
        for lease in (*self._slot_leases, *self._slotless_leases):
            lease.abort_attempt()

    def abort_movable_attempts(self) -> None:
        """Aborts the attempts whose answer has not begun and that another node could serve.

        The server does not answer probes. A server process that hangs closes no connection, so these requests would
        wait until their deadline."""
        for lease in list(self._slot_leases):
            if lease.can_move is not None and lease.can_move():
                lease.abort_attempt()


def _is_node_failure(outcome: Outcome, *, has_slot: bool) -> bool:
    """Whether this end counts against the node.

    A 500 to a request that is no inference is about the model store (it is Ollama's answer to a copy that cannot be
    made). It says nothing about how the node generates."""
    return rule_for_outcome(outcome).counts_against_node and (has_slot or outcome is not Outcome.SERVER_ERROR)
