"""``RefusedLoads``: which waiting requests need not be asked whether they take one more slot that needs a load. Pure.

A slot becomes free on a node that does not have the model of the next request in memory. Mostly that request refuses
it, and waits for a node with its model. In a large fleet such slots become free all the time, and each question takes
several forecasts. So for a short time after such an answer, the requests of the same group are not asked for slots that
are no better.

They lose nothing by it: the request that has refused is patient for longer than that. When its patience ends, or when
anything happens on the node, its slots are offered again. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.policies.base import Choice
from gpumesh.balancer.scheduling.waiting import Group

# In a fleet of up to SMALL_FLEET nodes, requests are asked for each slot. A refusal holds for so long for each further
# node, and at most. The more nodes there are, the more slots become free in this time. The most is less than any
# patience (``adaptive.PATIENCE_S``).
SMALL_FLEET = 100
REFUSED_S_PER_NODE = 0.0001
MAX_REFUSED_S = 0.1
MAX_GROUPS = 1000  # with more refusals, all are forgotten


class _Refusal(NamedTuple):
    """A load that was refused: until when that answer holds, how long the node takes for the load alone, whether it
    would push out a model, and whether other requests ran on the node."""

    until: float
    load_s: float
    pushes_out: bool
    is_busy: bool


class RefusedLoads:
    """The newest refusal of each group of waiting requests. ``accounts`` are all nodes; their owner adds to them."""

    def __init__(self, accounts: Sized) -> None:
        self._accounts = accounts
        self._refusals: dict[Group, _Refusal] = {}
        self._patience_ended_at: dict[Group, float] = {}  # when the patience of a request of the group was over

    def __repr__(self) -> str:
        return f"<RefusedLoads of {len(self._refusals)} groups>"

    def note_answer(self, group: Group, account: NodeAccount, choice: Choice, now: float) -> None:
        """Notes the answer of a request of the group: it was asked whether it takes a free slot of this node, and takes
        no slot."""
        if group.residency is None or choice.patience_s is None or choice.patience_s <= MAX_REFUSED_S:
            return
        if self._patience_ended_at.get(group) == now:
            return
        if any(_is_free_with_load(forecast, account.name) for forecast in choice.considered):
            load_s = account.rates.load_s(group.residency.model)
            is_busy, pushes_out = bool(account.placed), bool(account.residency.loaded)
            if len(self._refusals) >= MAX_GROUPS:
                self._refusals.clear()
            until = now + min(REFUSED_S_PER_NODE * max(len(self._accounts) - SMALL_FLEET, 0), MAX_REFUSED_S)
            self._refusals[group] = _Refusal(until, load_s, pushes_out, is_busy)

    def note_end_of_patience(self, group: Group, now: float) -> None:
        """The patience of a request of this group is over: now the group is asked for each free slot."""
        self._refusals.pop(group, None)
        if len(self._patience_ended_at) >= MAX_GROUPS:
            self._patience_ended_at.clear()
        self._patience_ended_at[group] = now

    def holds_for(self, group: Group, account: NodeAccount, now: float) -> bool:
        """Whether the group need not be asked for a slot of this node, because it has just refused a load on a node
        that was no worse for it."""
        refusal = self._refusals.get(group)
        if refusal is None or group.residency is None:
            return False
        if now >= refusal.until:
            del self._refusals[group]
            return False
        if account.residency.is_resident(group.residency):
            return False
        # This node may be better if its load takes less time, if it pushes out no model, or if it delays no request.
        loads_faster = account.rates.load_s(group.residency.model) < refusal.load_s
        pushes_out_less = refusal.pushes_out and not account.residency.loaded
        is_less_busy = refusal.is_busy and not account.placed
        return not (loads_faster or pushes_out_less or is_less_busy)


def _is_free_with_load(forecast: Forecast, node: str) -> bool:
    return forecast.node == node and forecast.is_free and forecast.load_s > 0.0
