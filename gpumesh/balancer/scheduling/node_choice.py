"""``NodeChoice``: which nodes can serve a demand, which of them are compared, and what the policy chooses. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from random import Random

from msgspec.structs import replace

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand
from gpumesh.balancer.policies import POLICIES
from gpumesh.balancer.policies.base import Choice, Question
from gpumesh.balancer.scheduling.shortlist import Shortlist
from gpumesh.balancer.scheduling.waiting import with_residency
from gpumesh.balancer.select import suits_demand
from gpumesh.balancer.work import Work
from gpumesh.text.model_names import full_name
from gpumesh.topology import PolicyKind


class NodeChoice:
    """Chooses among ``accounts``, to which their owner adds. In a large fleet only a shortlist is compared."""

    def __init__(self, accounts: Mapping[str, NodeAccount], policy: PolicyKind, rng: Random) -> None:
        self.shortlist = Shortlist(accounts, rng)
        self.policy = POLICIES[policy]
        self._accounts = accounts

    def __repr__(self) -> str:
        return f"<NodeChoice among {len(self._accounts)} nodes>"

    def select(
        self, demand: Demand, now: float, *, exclude: Collection[str] = (), despite_breaker: bool = False
    ) -> list[NodeAccount]:
        """The nodes that can serve this demand now, or as soon as they have a free slot."""
        return self._filter(self._accounts.values(), demand, now, exclude, despite_breaker=despite_breaker)

    def can_serve(self, demand: Demand, now: float, *, exclude: Collection[str] = ()) -> bool:
        """Whether any node can serve this demand now, or as soon as it has a free slot."""
        if demand.node is None and self.shortlist.is_needed:
            demand = with_residency(demand)
            table = self.shortlist.table(demand, now)
            return any(self._filter((account,), demand, now, exclude) for account in table)
        return bool(self.select(demand, now, exclude=exclude))

    @staticmethod
    def _filter(
        accounts: Iterable[NodeAccount],
        demand: Demand,
        now: float,
        exclude: Collection[str],
        *,
        despite_breaker: bool = False,
    ) -> list[NodeAccount]:
        """Those of ``accounts`` that can serve this demand now, or as soon as they have a free slot.
        ``despite_breaker``: also nodes whose breaker is open."""
        # A request about the model store does not run the model, so it may go to a node where the model is broken.
        model = None if demand.model is None or not demand.needs_slot else full_name(demand.model)
        selected: list[NodeAccount] = []
        for account in accounts:
            if not account.is_up or not suits_demand(account, demand):
                continue
            if account.is_suspect:  # seldom
                if not despite_breaker and not account.breaker.allows(now):
                    continue
                if model is not None and account.is_broken_for(model, now, despite_doubt=despite_breaker):
                    continue
            if not exclude or account.name not in exclude:
                selected.append(account)
        return selected

    def nodes_to_compare(
        self, demand: Demand, work: Work, now: float, *, exclude: Collection[str], is_new: bool = False
    ) -> list[NodeAccount]:
        """The nodes to compare for this demand: all that can serve it, or in a large fleet a few of them. ``is_new``:
        for a new request, which a policy may compare with all nodes. In a large fleet the list is then empty if none of
        those few has a free slot."""
        if demand.node is None and self.shortlist.is_needed and not (is_new and self.policy.ranks_all):
            return self.shortlist.pick(demand, work.cached, now, exclude=exclude, needs_free=is_new)
        return self._filter(self._accounts.values(), demand, now, exclude)

    def free_nodes_to_compare(
        self, demand: Demand, work: Work, now: float, *, exclude: Collection[str]
    ) -> list[NodeAccount]:
        """The ``nodes_to_compare`` that have a free slot."""
        if demand.node is None and self.shortlist.is_needed and not self.shortlist.table(demand, now).has_free:
            return []
        model = None if demand.residency is None else demand.residency.model
        accounts = self.nodes_to_compare(demand, work, now, exclude=exclude)
        return [account for account in accounts if account.has_room(model, now)]

    def count_warm_slots(self, demand: Demand, accounts: Collection[NodeAccount], now: float) -> int:
        """The slots of the nodes that have the model in memory; at least 1. ``accounts`` are the compared nodes. If it
        is empty, all nodes that can serve the demand count. In a large fleet, all nodes count in any case."""
        key = demand.residency
        if demand.node is None and self.shortlist.is_needed:
            return max(self.shortlist.table(demand, now).warm_slots, 1)
        slots = 0
        for account in accounts or self.select(demand, now):
            if key is None or account.residency.is_resident(key):
                slots += account.slots("" if key is None else key.model, now) or 1
        return max(slots, 1)

    def choose(self, question: Question, exclude: Collection[str]) -> Choice:
        """Asks the policy for a new request."""
        return self._ask_policy(self.policy.choose, question, exclude)

    def accept(
        self, account: NodeAccount, question: Question, exclude: Collection[str]
    ) -> tuple[Choice, Sequence[NodeAccount]]:
        """Asks the policy for a waiting request now that this node has a free slot. Returns the choice and the nodes
        that were compared. If the policy accepts the node at once, no other node is compared. ``question`` may lack the
        accounts."""
        choice = self.policy.accept_at_once(account, question)
        if choice.chosen is not None:
            return choice, (account,)
        accounts = self.nodes_to_compare(question.demand, question.work, question.now, exclude=exclude)
        if account not in accounts:  # a shortlist may lack it
            accounts.append(account)
        ask = partial(self.policy.accept, account, known=choice.considered)
        return self._ask_policy(ask, replace(question, accounts=accounts), exclude), accounts

    def _ask_policy(
        self, call_policy: Callable[[Question], Choice], question: Question, exclude: Collection[str]
    ) -> Choice:
        """Asks the policy. While no node of a shortlist can load the model now, asks again with another shortlist. If
        no shortlist has a node for the request, the request waits until the first of these nodes may load the model."""
        choice = call_policy(question)
        demand = question.demand
        shortest_patience_s: float | None = None  # of the shortlists before this one
        while self._needs_other_nodes(choice, question):
            if choice.patience_s is not None:
                known_s = choice.patience_s if shortest_patience_s is None else shortest_patience_s
                shortest_patience_s = min(known_s, choice.patience_s)
            accounts = self.shortlist.pick(demand, question.work.cached, question.now, exclude=exclude)
            choice = call_policy(replace(question, accounts=accounts))
        if choice.chosen is None and choice.patience_s is None and shortest_patience_s is not None:
            return replace(choice, patience_s=shortest_patience_s)
        return choice

    def _needs_other_nodes(self, choice: Choice, question: Question) -> bool:
        """Whether other nodes of a large fleet must be compared: none of these nodes is free, and some of them have a
        slot, but cannot load the model now. These nodes are noted in the shortlist, so that it picks others."""
        if choice.chosen is not None or any(considered.is_free for considered in choice.considered):
            return False
        if question.demand.node is not None or not self.shortlist.is_needed:
            return False
        return self.shortlist.note_blocked_nodes(question.demand, choice.considered, question.queue_s, question.now)
