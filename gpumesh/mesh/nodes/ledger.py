"""A node's ledger: leases, breakers, learned limit and rates, counts of outcomes, and sessions (conversations).

A node remembers the sessions that came to it, because the beginning of their prompts may still be in its cache.
All of this runs on the mesh's event loop, without I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gpumesh.backends.base import ParallelismSource, ServerCounters
from gpumesh.backends.dialects import find_dialect
from gpumesh.balancer.base import Demand
from gpumesh.balancer.breaker import Breaker, ModelBreakers
from gpumesh.balancer.limits import ParallelLimit, learn_limit
from gpumesh.balancer.outcomes import AttemptContext, Blame, ErrorReply, Outcome, find_blame
from gpumesh.mesh.nodes.lease import Lease, LeasedNode
from gpumesh.mesh.nodes.rate_meter import Smoothed
from gpumesh.model_names import full_name
from gpumesh.topology import BackendSpec

MIN_LOAD_MS = 200.0  # a shorter load_duration is no load: a model that is in memory reports some ms too
MAX_SESSIONS = 256  # of one node; with more, the session whose last request is the oldest is forgotten
MIN_RATE_TOKENS = 4  # an answer with fewer tokens is too short to measure tokens/s


class Ledger:
    """Gives out the leases of one node and keeps account of them.

    - ``on_slot_freed`` is called when a slot may have become free.
    - ``on_change`` is called when a figure has changed.
    - ``on_failure`` is called with outcome and reason when an attempt failed and the node, or the model on it, was at
      fault.
    - ``on_model_loaded`` is called with a model that has just answered, so that it is in the server's memory.
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
        self.model_breakers = ModelBreakers()
        self.learned_limit = ParallelLimit()
        self.rates = Smoothed()
        """Tokens/s by model."""
        self.load_times = Smoothed()
        """Seconds that the loading of a model took, by model."""
        self.sessions: dict[str, None] = {}
        """The sessions that have sent a request to this node, ordered by their last request, the oldest first."""
        self.served = self.failed = self.cancelled = 0
        self.attempt_outcomes: Counter[Outcome] = Counter()
        """The number of attempts that took a slot, by the outcome of the attempt."""
        self.last_release_at = clock()
        dialect = find_dialect(spec.kind)  # None for kind auto: the server may turn out to be Ollama
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
        """The number of held leases that take a slot."""
        return len(self._slot_leases)

    def lease(self, node: LeasedNode, demand: Demand) -> Lease:
        """Gives out a lease of ``node``, even if no slot is free: the dispatcher has decided that. A request to the
        model store gets a lease without a slot."""
        model = None if demand.model is None else full_name(demand.model)
        concurrent = len(self._slot_leases) + 1  # with this lease
        lease = Lease(node, self, model, concurrent)
        leases = self._slot_leases if demand.needs_slot else self._slotless_leases
        leases.add(lease)
        now = self._clock()
        self.breaker = self.breaker.record_start(now)
        if model is not None and demand.needs_slot:
            self.model_breakers.record_start(model, now)
        if demand.session is not None:
            self._remember_session(demand.session)
        self._on_change()
        return lease

    def _remember_session(self, session: str) -> None:
        """Adds the session, or moves it to the end if it is there already."""
        self.sessions.pop(session, None)
        self.sessions[session] = None
        while len(self.sessions) > MAX_SESSIONS:
            oldest_session = next(iter(self.sessions))
            del self.sessions[oldest_session]

    # -- the end of a lease --------------------------------------------------------------------------------------

    def settle(
        self,
        lease: Lease,
        outcome: Outcome,
        counters: ServerCounters | None,
        error: str | None,
        reply: ErrorReply | None,
    ) -> None:
        """Removes a used lease, and learns from its outcome. ``Lease.release`` calls this once for each lease."""
        now = self._clock()
        has_slot = lease in self._slot_leases
        increment = 1 if has_slot else 0  # the counters count only attempts with a slot
        self._remove(lease)
        self.last_release_at = now
        self.attempt_outcomes[outcome] += increment
        if outcome is Outcome.SERVED:
            self.served += increment
            self.breaker = self.breaker.record_success()
            if has_slot:  # a request without a slot needs no inference, so it shows nothing about the models
                self.model_breakers.record_success(lease.model, now)
            if counters is not None:
                self._learn(lease, counters, now)
        else:
            lease.blame = find_blame(outcome, AttemptContext(has_slot, lease.model, lease.was_loaded, reply))
            if outcome is Outcome.CLIENT_GONE:
                self.cancelled += increment
            elif lease.blame not in (Blame.NOBODY, Blame.MISSING_MODEL):
                self.failed += increment
            self._count_failure(lease, reply, now, has_slot=has_slot)
            if lease.blame is not Blame.NOBODY:
                self._on_failure(outcome, error)
        self._announce_free_slot()

    def _count_failure(self, lease: Lease, reply: ErrorReply | None, now: float, *, has_slot: bool) -> None:
        """Counts an outcome other than success for the breaker that ``lease.blame`` names. For the other breakers the
        outcome proves nothing, so it only ends their trials."""
        is_models_fault = lease.blame not in (Blame.NOBODY, Blame.NODE)
        if is_models_fault and lease.model is not None:
            # Everybody can read it in the status. A message about a load is kept; another one may quote a prompt.
            message = reply.message if reply is not None and lease.blame is Blame.MODEL_LOAD else ""
            node_is_suspect = self.model_breakers.record_failure(
                lease.model, lease.blame, message, now, was_loaded=lease.was_loaded
            )
            self.breaker = self.breaker.trip(now) if node_is_suspect else self.breaker.cancel_trial()
            return
        if has_slot:
            self.model_breakers.cancel_trial(lease.model)
        is_nodes_fault = lease.blame is Blame.NODE
        self.breaker = self.breaker.record_failure(now) if is_nodes_fault else self.breaker.cancel_trial()

    def discard(self, lease: Lease) -> None:
        """Removes a lease that was never used. ``Lease.discard`` calls this once for each lease."""
        if lease in self._slot_leases:
            self.model_breakers.cancel_trial(lease.model)
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
        """Updates the learned limit, rate and load time from the server's figures for one answer."""
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

    # -- the breakers --------------------------------------------------------------------------------------------

    def reset_breakers(self) -> None:
        """Forgets all failures, because the connection or the server is new."""
        self.breaker = Breaker()
        self.model_breakers.forget_all()

    def forgive_failure(self, lease: Lease) -> None:
        """Takes back the failure with which this lease ended: another node failed at the same request, so the request
        was at fault."""
        now = self._clock()
        if lease.blame is Blame.NODE:
            self.breaker = self.breaker.forgive_failure(now)
        elif lease.blame is Blame.MODEL and lease.model is not None:
            self.model_breakers.forgive_failure(lease.model, now)
        self._announce_free_slot()

    def end_trials_early(self, lease: Lease) -> None:
        """Ends the trials of half-open breakers when the answer of this lease's attempt has begun. So the next request
        need not wait for the end of this answer."""
        had_trial = self.breaker.trial_in_flight
        if had_trial:
            self.breaker = self.breaker.cancel_trial()
        if lease in self._slot_leases:
            had_trial |= self.model_breakers.cancel_trial(lease.model)
        if had_trial:
            self._on_slot_freed()

    # -- aborting ------------------------------------------------------------------------------------------------

    def abort_all_attempts(self) -> None:
        """Aborts all attempts, because the connection to the node is lost."""
        for lease in (*self._slot_leases, *self._slotless_leases):
            lease.abort_attempt()

    def abort_movable_attempts(self) -> None:
        """Aborts each attempt with a slot whose answer has not begun and could come from another node.

        Called when the server does not answer probes. A server process that hangs closes no connection, so these
        requests would wait until their deadline."""
        for lease in list(self._slot_leases):  # a copy, because an aborted attempt may release its lease
            if lease.can_move is not None and lease.can_move():  # None: the answer has begun
                lease.abort_attempt()
