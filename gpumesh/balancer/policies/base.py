"""What every policy gets (``Question``) and answers (``Choice``)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

import msgspec

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.base import Demand
from gpumesh.balancer.forecast import FleetLoad, Forecast, forecast
from gpumesh.balancer.work import Work


class Question(msgspec.Struct, frozen=True, gc=False):
    """Where should this request go now?

    ``accounts`` are the nodes that can serve the request, with or without a free slot. ``queue_s``: the seconds for
    which the requests that wait before it will keep the slots of the nodes that have its model in memory. ``turn``
    grows with each choice, so that equally good nodes take turns. ``waited_s``: how long the request has waited
    already.
    """

    accounts: Sequence[NodeAccount]
    demand: Demand
    work: Work
    fleet: FleetLoad
    queue_s: float
    now: float
    turn: int
    rng: Random
    waited_s: float = 0.0

    @property
    def model(self) -> str | None:
        key = self.demand.residency
        return None if key is None else key.model

    def tier(self, account: NodeAccount) -> int:
        """The node's tier for this request: a node that mesh.yaml prefers for the model comes before all others."""
        return 0 if account.name in self.demand.preferred_nodes else account.tier

    def forecast(self, account: NodeAccount, *, queue_s: float | None = None) -> Forecast:
        """The cost of the request on this node. ``queue_s`` replaces the question's own."""
        return forecast(
            account,
            self.demand,
            self.work,
            self.fleet,
            self.queue_s if queue_s is None else queue_s,
            self.now,
        )


class Choice(msgspec.Struct, frozen=True, gc=False):
    """The answer of a policy: ``chosen`` is the forecast for the chosen node; ``None``: the request should wait.
    ``considered`` are the forecasts of all nodes that were compared.

    ``patience_s``: the seconds for which the request should wait although a node has a free slot, because another node
    is better, or because that node must not begin another load yet. ``None``: no node has a free slot."""

    chosen: Forecast | None
    considered: Sequence[Forecast] = ()
    patience_s: float | None = None


NO_CHOICE = Choice(None)
"""The answer if no node was compared: none has a free slot, or the question needs no forecast."""


class Policy(Protocol):
    """Chooses nodes. It holds no state: what it knows is in the question."""

    @property
    def ranks_all(self) -> bool:
        """Whether ``choose`` must get all nodes of a large fleet, and not a shortlist."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a free slot may go past the next request of the queue, to a later request that loses less there."""

    def choose(self, question: Question) -> Choice:
        """Chooses a node with a free slot, or says that the request should wait."""

    def accept_at_once(self, account: NodeAccount, question: Question) -> Choice:
        """Takes a free slot of this node for a waiting request if the other nodes need not be looked at for it; they
        are not in the question. If it chooses none, ``accept`` decides."""

    def accept(self, account: NodeAccount, question: Question, known: Sequence[Forecast] = ()) -> Choice:
        """Chooses for a waiting request now that this node has a free slot. Others may have free slots too. ``known``:
        the forecasts that ``accept_at_once`` has made for it."""


def nodes_with_room(question: Question) -> list[NodeAccount]:
    """The nodes with a free slot, of the lowest tier that has any."""
    model, now = question.model, question.now
    free = [account for account in question.accounts if account.has_room(model, now)]
    if len(free) > 1:
        tier = min(question.tier(account) for account in free)
        free = [account for account in free if question.tier(account) == tier]
    return free
