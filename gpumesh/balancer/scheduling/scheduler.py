"""``Scheduler``: gives each request a slot on the node where it costs least, or a place in the queue. Pure.

All nodes that could serve a request are ranked, also busy nodes: to wait for a node that has the model in memory is
often better than to load the model on another node. So a slot may stay free although requests wait. Such a request
waits for a better node, but not longer than its forecast said, with a margin.

The owner reports what happens (``place_now``, ``wait``, ``note_first_token``, ``end``, ``note_change``), and sends the
requests that ``grants`` returns. It calls ``grants`` after each event, and at the time of ``next_check``. All times are
seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from random import Random
from typing import cast

import msgspec

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand
from gpumesh.balancer.clock_check import correct_durations
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.forecast import Copies, FleetLoad, Forecast, forecast, place_on
from gpumesh.balancer.models.model_demand import ModelDemand
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.policies.base import NO_CHOICE, Question
from gpumesh.balancer.scheduling.look_ahead import LookAhead
from gpumesh.balancer.scheduling.node_choice import NodeChoice
from gpumesh.balancer.scheduling.refused_loads import RefusedLoads
from gpumesh.balancer.scheduling.roster import Roster
from gpumesh.balancer.scheduling.slow_nodes import SlowNodes
from gpumesh.balancer.scheduling.waiting import (
    Group,
    Patience,
    Pauses,
    Refused,
    Waiting,
    can_serve,
    group_of,
    with_residency,
)
from gpumesh.balancer.work import Work
from gpumesh.topology import PolicyKind

# The least time between two answers of one node from which we learn: a part of many answers is enough to measure it.
LEARN_INTERVAL_S = 0.05


class Placement(msgspec.Struct, frozen=True, eq=False):
    """A slot on a node: the request there, and the forecast that chose it among ``considered``."""

    placed: PlacedRequest
    forecast: Forecast
    considered: Sequence[Forecast]


class Scheduler:
    """Places requests on nodes, and lets at most ``max_queue`` requests wait. ``pinned`` are the full names of the
    models that must not be pushed out of a node's memory.

    The class is long because it is the interface to all that happens to requests: each event is one short method."""

    def __init__(
        self, policy: PolicyKind, *, rng: Random, max_queue: int, pinned: frozenset[str] = frozenset()
    ) -> None:
        self.accounts: dict[str, NodeAccount] = {}  # by the name of the node
        self.experience = Experience()
        self.queue: FairQueue[Waiting] = FairQueue(max_queue)
        self.choice = NodeChoice(self.accounts, policy, rng)
        self.slow_nodes = SlowNodes(self.accounts)
        self._look_ahead = LookAhead(self.accounts, self.experience, self.queue, self.choice.policy)
        self._rng = rng
        self._fleet = FleetLoad(self.experience, ModelDemand(), Copies(), pinned)
        self._turn = 0  # grows with each choice; equal nodes are rotated by it
        self._changed: dict[str, NodeAccount] = {}  # nodes that may have got a free slot, in the order of the changes
        self._pauses = Pauses()
        self._patience = Patience()
        self._refused_loads = RefusedLoads(self.accounts)
        copies = self._fleet.copies
        self.roster = Roster(
            self.accounts, self.experience, self.choice, self.slow_nodes, copies, self._pauses, self._changed
        )
        self._refused: Refused | None = None  # what the last ``place_now`` did not place; for ``wait``

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.accounts)} nodes, {self.queue.size} waiting>"

    def change_settings(self, policy: PolicyKind, *, max_queue: int, pinned: frozenset[str]) -> None:
        """Takes over other settings of mesh.yaml, for all later decisions."""
        self.choice.policy = self._look_ahead.policy = POLICIES[policy]
        self.queue.max_size = max_queue
        self._fleet.pinned = pinned

    # -- a request comes -----------------------------------------------------------------------------------------

    def place_now(
        self,
        demand: Demand,
        now: float,
        *,
        exclude: Collection[str] = (),
        despite_breaker: bool = False,
        may_wait: bool = True,
    ) -> Placement | None:
        """Places the request on the best node. Returns ``None`` if it should wait: no node that could serve it has a
        free slot, or another node is clearly worth waiting for. If it may not wait, it takes the best free slot.
        ``despite_breaker``: a node whose breaker is open may be taken too."""
        original_demand = demand
        if demand.residency is None:
            demand = with_residency(demand)  # adds the key: the model with default settings
        work = self.experience.estimate(demand)
        if despite_breaker:
            accounts = self.choice.select(demand, now, exclude=exclude, despite_breaker=True)
        else:
            accounts = self.choice.nodes_to_compare(demand, work, now, exclude=exclude, is_new=True)
        if not accounts:
            self._refused = Refused(original_demand, demand, work, NO_CHOICE)
            return None
        chosen: Forecast | None = None
        if len(accounts) == 1 and not self.queue.size:  # if the only node has a free slot, there is no choice
            chosen = forecast(accounts[0], demand, work, self._fleet, 0.0, now)
            considered: Sequence[Forecast] = (chosen,)
        if chosen is None or not chosen.is_free:
            question = self._question(accounts, demand, work, now, waited_s=0.0 if may_wait else math.inf)
            choice = self.slow_nodes.find_probe(question) or self.choice.choose(question, exclude)
            chosen, considered = choice.chosen, choice.considered
            if chosen is None:
                self._refused = Refused(original_demand, demand, work, choice)
                return None
        if self.slow_nodes.slowed:
            self.slow_nodes.record_choice(chosen.node, accounts, now)
        if demand.residency is not None:
            self._fleet.demands.note_request(demand.residency, now)
        placement = self._place(chosen, considered, demand, work, now)
        if self.queue.size:  # otherwise no other client wants the slot, so the client is not charged
            self.queue.grant_unqueued(demand.priority, demand.client, work.cost)
            placement.placed.is_charged = True
        return placement

    def wait(
        self,
        demand: Demand,
        now: float,
        payload: object,
        *,
        exclude: frozenset[str] = frozenset(),
        accepted_at: float | None = None,
    ) -> QueueEntry[Waiting]:
        """Puts the request into the queue. ``accepted_at`` is given for a request that has failed on a node: it
        keeps its old place, and is added even to a full queue. Otherwise raises OverflowError if the queue is full."""
        refused, self._refused = self._refused, None
        if refused is not None and refused.original_demand is demand:
            _, demand, work, choice = refused
        else:
            # Asked before the request is in the queue, where its own work would count as work that waits before it.
            demand = with_residency(demand)
            work = self.experience.estimate(demand)
            accounts = self.choice.nodes_to_compare(demand, work, now, exclude=exclude, is_new=True)
            question = self._question(accounts, demand, work, now)
            choice = self.choice.choose(question, exclude) if accounts else NO_CHOICE
        entry = self.queue.add(
            Waiting(demand, exclude, payload, now),
            demand.priority,
            now if accepted_at is None else accepted_at,
            group=group_of(demand, exclude),
            client=demand.client,
            work=1.0 if demand.residency is None else self._fleet.demands.service_s(demand.residency),
            tokens=work.cost,
            bounded=accepted_at is None,
        )
        if demand.residency is not None:
            self._fleet.demands.note_request(demand.residency, now)
        # If a slot is free, the request waits for a better node, but only for a limited time.
        if choice.patience_s is not None:
            self._patience.begin(entry, choice.patience_s, now)
        elif choice.chosen is not None:  # the node has got a free slot by now: ``grants`` must offer it
            self.note_change(self.accounts[choice.chosen.node])
        return entry

    def _question(
        self,
        accounts: Sequence[NodeAccount],
        demand: Demand,
        work: Work,
        now: float,
        *,
        waited_s: float = 0.0,
        own_work: float = 0.0,
    ) -> Question:
        """The question for the policy. ``own_work``: the request's own work, if the request is in the queue."""
        queue_s = 0.0  # how long the requests that wait before this one will keep the slots of the nodes with its model
        if self.queue.size:
            work_s = self.queue.work_before(group_of(demand, frozenset()), demand.priority) - own_work
            if work_s > 0.0:
                queue_s = work_s / self.choice.count_warm_slots(demand, accounts, now)
        return Question(accounts, demand, work, self._fleet, queue_s, now, self._turn, self._rng, waited_s)

    def _place(
        self, chosen: Forecast, considered: Sequence[Forecast], demand: Demand, work: Work, now: float
    ) -> Placement:
        """Places the request on the chosen node, and notes what this changes for the next decisions."""
        self._turn += 1
        account = self.accounts[chosen.node]
        placed = place_on(account, demand, work, chosen, now)
        if self.choice.shortlist.is_needed:
            for member in account.group.accounts:
                self.choice.shortlist.note_change(member)
        if placed.needs_load and placed.key is not None:
            self._fleet.copies.update(account)
            for model in chosen.pushed_out:
                self.note_unloaded(account, model)
        if demand.prompt is not None or demand.session is not None:
            self.experience.note_placed(placed, now)
        return Placement(placed, chosen, considered)

    # -- a request goes on ---------------------------------------------------------------------------------------

    def note_first_token(self, placed: PlacedRequest, now: float) -> None:
        """The answer has begun. A second call does nothing."""
        if placed.first_token_at is None and not placed.ended:
            account = placed.account
            known_models = len(account.residency.loaded)
            limit = None if placed.sent is None else account.learned_slots.limit(placed.sent.model)
            account.note_first_token(placed, now)
            if now >= account.first_token_noted_at + LEARN_INTERVAL_S:
                account.first_token_noted_at = now
                self.slow_nodes.note_first_token(placed, now)
            if len(account.residency.loaded) != known_models:  # another program had loaded the model
                self._fleet.copies.update(account)
            # Only if more slots are known now, or another load may begin, waiting requests must look at the node again.
            has_more_slots = placed.sent is not None and account.learned_slots.limit(placed.sent.model) is not limit
            if has_more_slots or placed.needs_load:
                self.note_change(account)

    def end(self, placed: PlacedRequest, now: float, counters: ServerCounters | None = None) -> None:
        """The request has ended on its node. ``counters`` are the server's figures for a whole answer (all may be
        unknown); ``None`` if the answer is not whole. A second call does nothing."""
        if placed.ended:
            return
        account = placed.account
        is_charged = placed.is_charged or self.queue.size > 0
        if counters is None:
            account.remove(placed, now)
        elif self.learns_from(placed, now):
            account.learned_at = now
            self.experience.learn_counts(placed, counters)
            counters = self.experience.correct_counts(placed, counters)
            self._learn(placed, counters, now)
            if is_charged:
                self._charge_true_cost(placed, counters)
        else:
            account.remove(placed, now, counters)
            if is_charged:
                self._charge_true_cost(placed, self.experience.correct_counts(placed, counters))
        if self.queue.size or self.choice.shortlist.is_needed or account.breaker.open_until is not None:
            for member in account.group.accounts:
                self.note_change(member)

    def learns_from(self, placed: PlacedRequest, now: float) -> bool:
        """Whether ``end`` would learn from the counters of this request now."""
        account = placed.account
        return not account.is_removed and (placed.needs_load or now >= account.learned_at + LEARN_INTERVAL_S)

    def _learn(self, placed: PlacedRequest, counters: ServerCounters, now: float) -> None:
        """Removes a request whose whole answer has come, and learns from it."""
        account = placed.account
        counters = correct_durations(counters, placed, now)
        mean_streams, stalled_share = account.mean_streams(placed, now), account.stalled_share(placed, now)
        account.remove(placed, now, counters)
        self.experience.learn_from_answer(placed, counters, now, mean_streams=mean_streams, stalled_share=stalled_share)
        self.slow_nodes.note_answer(placed, counters, now, mean_streams=mean_streams, stalled_share=stalled_share)
        if placed.key is None:
            return
        if counters.load_ms is not None or not placed.needs_load:
            load_s = (counters.load_ms or 0.0) / 1000.0
            self._fleet.demands.note_service(placed.key, max(now - placed.sent_at - load_s, 0.0))
        account.residency.note_answer(placed.key, now)
        self._fleet.copies.update(account)

    def note_failed(self, placed: PlacedRequest) -> None:
        """Called after ``end`` if the request had no success. If the server had to load the model for it, the load may
        have failed too. If the load goes on, the server's next report shows this."""
        if placed.is_charged and placed.first_token_at is None:  # the server gave nothing: takes the charge back
            self.queue.charge(placed.demand.priority, placed.demand.client, -placed.work.cost)
        account, model = placed.account, placed.model
        is_loading = model is not None and account.residency.load_ends_at(model) is not None
        # If other requests for the model are still on the node, the load may go on for them.
        if model is not None and is_loading and placed.needs_load and model not in account.placed_by_model:
            account.residency.note_failed_load(model)
            self._fleet.copies.update(account)

    def _charge_true_cost(self, placed: PlacedRequest, counters: ServerCounters) -> None:
        """Charges the client the difference between the true cost of the request, by the corrected ``counters``, and
        the cost that the client was charged for the request before."""
        cost = self.experience.true_cost(placed, counters)
        if cost is not None:
            charged = placed.work.cost if placed.is_charged else 0.0
            self.queue.charge(placed.demand.priority, placed.demand.client, cost - charged)

    def note_change(self, account: NodeAccount) -> None:
        """The node may have got a free slot, may have become usable, or its breaker has changed."""
        if (self.queue.size or account.breaker.open_until is not None) and not account.is_removed:
            self._changed[account.name] = account
        if self.choice.shortlist.is_needed:
            self.choice.shortlist.note_change(account)

    def note_report(self, account: NodeAccount) -> None:
        """A probe has changed what the node has in memory."""
        self._fleet.copies.update(account)
        self.note_change(account)

    def note_unloaded(self, account: NodeAccount, model: str) -> None:
        """The server has unloaded this model, and with it the prompts in its cache."""
        self.experience.forget_prompts(account.name, model)

    # -- the queue -----------------------------------------------------------------------------------------------

    def grants(self, now: float) -> list[tuple[QueueEntry[Waiting], Placement]]:
        """Gives the free slots to the waiting requests, and takes these out of the queue."""
        for account in self._changed.values():
            if account.breaker.open_until is not None:
                self._pauses.begin(account)
        if not self.queue.size:
            self._changed.clear()
            self._patience.clear()
            return []
        self._end_patience(now)
        for account in self._pauses.take_ended(now):
            self.note_change(account)
        granted: list[tuple[QueueEntry[Waiting], Placement]] = []
        while self._changed:
            account = self._changed.pop(next(iter(self._changed)))
            while self.queue.size:
                grant = self._grant_next(account, now)
                if grant is None:
                    break
                granted.append(grant)
        return granted

    def next_check(self) -> float | None:
        """The time at which ``grants`` must be called even if nothing happens: the patience of a request is over, or
        the pause of a node's breaker."""
        if not self.queue.size:
            self._patience.clear()
            return None
        times = self._pauses.ends()
        next_end = self._patience.next_end(self.queue)
        if next_end is not None:
            times.append(next_end)
        return min(times, default=None)

    def _grant_next(self, account: NodeAccount, now: float) -> tuple[QueueEntry[Waiting], Placement] | None:
        """Gives a free slot of this node to the waiting request that is next. ``None`` if the node has no free slot, or
        if no request would take it."""
        if not account.is_usable(now):
            return None
        servable_groups = [group for group in self.groups() if can_serve(account, group, now)]
        groups = [group for group in servable_groups if not self._refused_loads.holds_for(group, account, now)]
        while groups:
            next_request = self._look_ahead.find_next(account, groups, now)
            if next_request is None:
                return None
            entry, work = next_request
            waiting = entry.payload
            waited_s = 0.0 if waiting.offered_at is None else now - waiting.offered_at
            own_work = 0.0 if waiting.exclude else entry.work  # after a failure, a request is in another group
            question = self._question((), waiting.demand, work, now, waited_s=waited_s, own_work=own_work)
            choice, compared_accounts = self.choice.accept(account, question, waiting.exclude)
            if choice.chosen is not None:
                self.queue.take(entry, servable_groups)
                placement = self._place(choice.chosen, choice.considered, waiting.demand, work, now)
                self.slow_nodes.record_choice(choice.chosen.node, compared_accounts, now)
                placement.placed.is_charged = True
                return entry, placement
            is_due = waiting.patience_until is None or waiting.patience_until <= now
            if choice.patience_s is not None and is_due:
                self._patience.begin(entry, choice.patience_s, now)
            self._refused_loads.note_answer(group := cast("Group", entry.group), account, choice, now)
            groups.remove(group)
        return None

    def groups(self) -> Collection[Group]:
        """The groups of the waiting requests."""
        return cast("Collection[Group]", self.queue.groups())

    def _end_patience(self, now: float) -> None:
        """Lets the requests that have waited long enough for a better node take any free slot from now on. If such a
        request has left the queue, its group keeps this right: perhaps its other requests were never offered a slot."""
        for entry in self._patience.take_ended(now):
            if self.queue.size_of(entry.group):
                waiting = entry.payload
                self._refused_loads.note_end_of_patience(cast("Group", entry.group), now)
                work = self.experience.estimate(waiting.demand)
                for account in self.choice.free_nodes_to_compare(waiting.demand, work, now, exclude=waiting.exclude):
                    self._changed[account.name] = account
