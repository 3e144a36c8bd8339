"""A node's ledger: its leases, the counts of their outcomes, and what the outcomes mean for the breakers.

The balancer's ``NodeAccount`` knows the placed requests; the ledger tells the ``Scheduler`` how each of them ends. All
of this runs on the mesh's event loop, without I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand
from gpumesh.balancer.breaker import Breaker
from gpumesh.balancer.breaker_updates import count_failure, count_success
from gpumesh.balancer.outcomes import AttemptContext, Blame, ErrorReply, Outcome, find_blame
from gpumesh.balancer.scheduling.scheduler import Placement, Scheduler
from gpumesh.mesh.nodes.forecast_record import ForecastRecord
from gpumesh.mesh.nodes.lease import Lease, LeasedNode
from gpumesh.text.model_names import full_name

_NO_FIGURES = ServerCounters()


class Ledger:
    """Gives out the leases of one node and keeps account of them. ``account`` is the node's account in ``scheduler``.
    ``served``, ``failed`` and ``cancelled`` count attempts that took a slot.

    - ``on_slot_freed`` is called when a slot may have become free.
    - ``on_change`` is called when a figure has changed.
    - ``on_failure`` is called when an attempt has failed and the node, or the model on this node, was at fault. Its
      arguments are the outcome and the reason; ``None``: no reason is known.
    - ``on_model_loaded`` is called with the full name of a model that has just answered, so that it must be in the
      server's memory.
    """

    def __init__(
        self,
        account: NodeAccount,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        on_slot_freed: Callable[[], None],
        on_change: Callable[[], None],
        on_failure: Callable[[Outcome, str | None], None],
        on_model_loaded: Callable[[str], None],
    ) -> None:
        self.account = account
        self._scheduler = scheduler
        self.model_breakers = account.model_breakers
        self.served = self.failed = self.cancelled = 0
        self.attempt_outcomes: Counter[Outcome] = Counter()
        """The number of attempts that took a slot, by the outcome of the attempt."""
        self.foreign_answer: str | None = None
        """Why the last answer to a request came from no inference server (``ErrorReply.foreign``); ``None`` if the node
        has served a request since."""
        self.forecasts = ForecastRecord()
        self.last_release_at = clock()
        """When the last used lease ended; at first the time of the start."""
        self._clock = clock
        self._on_slot_freed = on_slot_freed
        self._on_change = on_change
        self._on_failure = on_failure
        self._on_model_loaded = on_model_loaded
        self._slot_leases: set[Lease] = set()  # of requests that take a slot
        self._slotless_leases: set[Lease] = set()  # of requests that take none

    def __repr__(self) -> str:
        phase = self.breaker.phase(self._clock()).value
        return (
            f"<Ledger {self.in_flight} in flight, {self.served} served, {self.failed} failed, "
            f"{self.cancelled} cancelled, breaker {phase}>"
        )

    @property
    def breaker(self) -> Breaker:
        """The breaker of the node itself."""
        return self.account.breaker

    @breaker.setter
    def breaker(self, breaker: Breaker) -> None:
        self.account.breaker = breaker

    @property
    def in_flight(self) -> int:
        """The number of held leases that take a slot."""
        return len(self._slot_leases)

    @property
    def held(self) -> int:
        """The number of all held leases, also of those that take no slot."""
        return len(self._slot_leases) + len(self._slotless_leases)

    def models_in_flight(self) -> list[str | None]:
        """The model of each held lease that takes a slot; ``None`` for a request that names no model."""
        return [lease.model for lease in self._slot_leases]

    def lease(self, node: LeasedNode, demand: Demand, placement: Placement | None) -> Lease:
        """Gives out a lease of ``node`` for a request that the scheduler has placed there. A request to the model store
        has no placement, and takes no slot."""
        model = None if demand.model is None else full_name(demand.model)
        lease = Lease(node, self, model, placement)
        if placement is None:
            self._slotless_leases.add(lease)
            self.breaker = self.breaker.record_start(self._clock())
        else:
            self._slot_leases.add(lease)
            self.forecasts.note_placed(placement)
        self._on_change()
        return lease

    # -- the end of a lease --------------------------------------------------------------------------------------

    def settle(
        self,
        lease: Lease,
        outcome: Outcome,
        counters: ServerCounters | None,
        error: str | None,
        reply: ErrorReply | None,
    ) -> None:
        """Removes a lease that was used, and learns from its outcome. The arguments are those of ``Lease.release``,
        which calls this once."""
        now, placement = self._clock(), lease.placement
        if placement is None:
            self._slotless_leases.discard(lease)
        else:
            self._slot_leases.discard(lease)
            self._end_placement(placement, outcome, counters, now)
            if lease.give_back_place is not None:  # only where other gateways use the node too
                is_served = outcome is Outcome.SERVED
                self._give_back_place(lease, placement, counters or _NO_FIGURES if is_served else None)
        self.last_release_at = now
        if reply is not None and reply.foreign is not None:
            self.foreign_answer = reply.foreign
        if outcome is Outcome.SERVED:
            if placement is not None:
                self.foreign_answer = None
            count_success(self.account, lease.model, now, takes_slot=placement is not None)
            if counters is not None and lease.model is not None:  # only a model that was used has figures
                self._on_model_loaded(lease.model)
        else:
            self._count_unserved(lease, outcome, error, reply, now)
        self._announce_free_slot()

    def _end_placement(
        self, placement: Placement, outcome: Outcome, counters: ServerCounters | None, now: float
    ) -> None:
        """Frees the slot of a request, and learns from the request."""
        is_served = outcome is Outcome.SERVED
        self.attempt_outcomes[outcome] += 1
        if is_served:
            self.served += 1
            # Not ``None``, which would mean that the request was not answered.
            self._scheduler.end(placement.placed, now, counters or _NO_FIGURES)
        else:
            self._scheduler.end(placement.placed, now)
            self._scheduler.note_failed(placement.placed)
        self.forecasts.note_end(placement, now, counters, is_answered=is_served)

    def _count_unserved(
        self, lease: Lease, outcome: Outcome, error: str | None, reply: ErrorReply | None, now: float
    ) -> None:
        """Counts an attempt without success, as cancelled or as failed, and for the breaker that is to blame."""
        placement = lease.placement
        has_slot = placement is not None
        is_known_route = placement is None or placement.placed.demand.is_known_route
        context = AttemptContext(has_slot, lease.model, lease.was_loaded, reply, is_known_route)
        lease.blame = find_blame(outcome, context)
        if has_slot and outcome is Outcome.CLIENT_GONE:
            self.cancelled += 1
        elif has_slot and lease.blame is not Blame.NOBODY:
            self.failed += 1
        count_failure(self.account, context, lease.blame, now)
        if lease.blame is not Blame.NOBODY:
            self._on_failure(outcome, error)

    def learns_from(self, placement: Placement) -> bool:
        """Whether the balancer would learn from the answer of this request if it ended now."""
        return self._scheduler.learns_from(placement.placed, self._clock())

    def discard(self, lease: Lease) -> None:
        """Removes a lease that was never used. ``Lease.discard`` calls this once for each lease."""
        if lease.placement is not None:
            self.model_breakers.cancel_trial(lease.model)
            self._scheduler.end(lease.placement.placed, self._clock())
            self._scheduler.note_failed(lease.placement.placed)  # its client is not charged, and no load was begun
            self.forecasts.note_discarded(lease.placement)
            if lease.give_back_place is not None:
                self._give_back_place(lease, lease.placement, None)
        self._remove(lease)
        self.breaker = self.breaker.cancel_trial()
        self._announce_free_slot()

    def _give_back_place(self, lease: Lease, placement: Placement, counters: ServerCounters | None) -> None:
        """Gives back the place that the lease has among all gateways. ``counters``: those of a whole answer."""
        give_back, lease.give_back_place = lease.give_back_place, None
        if give_back is not None:
            give_back(self._scheduler.experience.cost_correction(placement.placed, counters))

    def _remove(self, lease: Lease) -> None:
        leases = self._slotless_leases if lease.placement is None else self._slot_leases
        leases.discard(lease)

    def _announce_free_slot(self) -> None:
        """Tells the scheduler and the mesh that a slot may have become free, or that a breaker may have changed."""
        self._scheduler.note_change(self.account)
        self._on_slot_freed()
        self._on_change()

    # -- the breakers --------------------------------------------------------------------------------------------

    def reset_breakers(self) -> None:
        """Forgets all failures, because the connection or the server is new."""
        self.breaker = Breaker()
        self.model_breakers.forget_all()
        self.foreign_answer = None

    def forgive_failure(self, lease: Lease) -> None:
        """Takes back the failure with which this lease ended: another node failed at the same request, so the request
        was at fault."""
        now = self._clock()
        if lease.blame is Blame.NODE:
            self.breaker = self.breaker.forgive_failure(now)
        elif lease.blame is Blame.MODEL and lease.model is not None:
            self.model_breakers.forgive_failure(lease.model, now)
        self._announce_free_slot()

    def note_resent(self, lease: Lease) -> None:
        """Counts a kept-alive connection that its server had closed when a request was sent over it. It is no fault of
        the node, and the lease goes on."""
        if lease.placement is not None:
            self.attempt_outcomes[Outcome.STALE_CONNECTION] += 1

    def note_answer_started(self, lease: Lease) -> None:
        """Notes that the first token of this lease's attempt has come. That may prove that the server has one slot
        more. It also ends the trials of half-open breakers, so that the next request need not wait for the end of this
        answer."""
        if lease.placement is not None:
            self._scheduler.note_first_token(lease.placement.placed, self._clock())
        had_trial = self.breaker.trial_in_flight
        if had_trial:
            self.breaker = self.breaker.cancel_trial()
        if lease.placement is not None:
            had_trial |= self.model_breakers.cancel_trial(lease.model)
        if had_trial:
            self._scheduler.note_change(self.account)
        if had_trial or self._scheduler.queue.size:
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
            can_move = lease.can_move is not None and lease.can_move()  # ``None``: the answer has begun
            if can_move:
                lease.abort_attempt()
