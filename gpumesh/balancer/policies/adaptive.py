"""``adaptive``: the node where the request costs least, to itself and to others. It may be worth waiting for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.forecast import Forecast, forecast
from gpumesh.balancer.policies.base import NO_CHOICE, Choice, Question
from gpumesh.balancer.policies.simple import relative_load

# A request waits for a busy node only if that node is clearly better than a free one: if the cost there, multiplied by
# PATIENCE_FACTOR, and PATIENCE_S more are still less. A forecast may be wrong, and a free slot that nobody takes is
# lost.
PATIENCE_FACTOR = 1.5
PATIENCE_S = 0.5
# A node that has the prompt in its cache saves work. It is worth a wait if the wait, multiplied by SAVING_FACTOR, and
# SAVING_S more are less than the work that it saves. This work is known better than the other parts of a forecast.
SAVING_FACTOR = 1.5
SAVING_S = 0.05
# What a free slot that nobody takes costs, as a multiple of the time in which the queue is served.
QUEUE_PRICE = 3.5
# The same if the prompts of requests are known. The next free slot then goes to a request that loses little there.
QUEUE_PRICE_WITH_PROMPTS = 2.0
# With a shorter queue, few answers are so short that the other nodes need not be looked at.
LONG_QUEUE_S = 1.0
# A node of a lower tier is better than a free one of an upper tier only if it is so much faster.
TIER_FACTOR = 3.0
TIER_S = 1.0
# Costs that differ by less count as equal, because forecasts are not more exact. Then the unread part of the prompt
# decides, then the load of the nodes, then the turn.
EQUAL_SHARE = 0.02
EQUAL_S = 0.01
# Unread parts of a prompt that differ by less, by this factor and by some tokens, are equal too.
EQUAL_UNREAD = 1.25
EQUAL_UNREAD_TOKENS = 32.0

_Option = tuple[Forecast, NodeAccount]
"""The cost of the request on a node, and the node."""


class AdaptivePolicy:
    ranks_all = False
    looks_ahead = True

    def choose(self, question: Question) -> Choice:
        model, now = question.model, question.now
        for account in question.accounts:
            if account.has_room(model, now):
                return self._choose(question, question.queue_s)
        return NO_CHOICE  # no forecast is needed for that

    def _choose(self, question: Question, queue_s: float, known: Sequence[Forecast] = ()) -> Choice:
        """``known`` are forecasts that were made already, for the same ``queue_s``."""
        demand, work, fleet, now = question.demand, question.work, question.fleet, question.now
        if known:
            known_of = {known_forecast.node: known_forecast for known_forecast in known}
            forecasts = [
                known_of.get(account.name) or forecast(account, demand, work, fleet, queue_s, now)
                for account in question.accounts
            ]
        else:
            forecasts = [forecast(account, demand, work, fleet, queue_s, now) for account in question.accounts]
        chosen = self._best_free(forecasts, question)
        if chosen is not None:
            return decide(chosen, forecasts, question)
        # Perhaps a node has a free slot, but must not begin another load yet. No event announces the time when it may.
        pairs = zip(question.accounts, forecasts, strict=True)
        waits_s = [option.wait_s for account, option in pairs if account.has_room(question.model, question.now)]
        return Choice(None, forecasts, max(min(waits_s) - queue_s, 0.0) if waits_s else None)

    def _best_free(self, forecasts: list[Forecast], question: Question) -> Forecast | None:
        """The best of the nodes with a free slot; ``None`` if there is none."""
        pairs = zip(forecasts, question.accounts, strict=True)
        free = [pair for pair in pairs if pair[0].is_free]
        if len(free) < 2:
            return free[0][0] if free else None
        equal = _find_cheapest(free, question)
        if len(equal) > 1 and (question.demand.prompt is not None or question.demand.session is not None):
            equal = _find_least_unread(equal, has_session=question.demand.session is not None)
        if len(equal) == 1:
            return equal[0][0]
        start = question.turn % len(equal)
        first_forecast, first_account = equal[start]
        if first_account.is_idle:  # no other can be less loaded
            return first_forecast
        return min((*equal[start:], *equal[:start]), key=lambda pair: relative_load(pair[1], question))[0]

    def accept_at_once(self, account: NodeAccount, question: Question) -> Choice:
        """Takes the slot if no other node could be worth waiting for: the longer the queue is, the less a wait can pay.
        Leaves the decision to ``accept`` if the queue is short."""
        if question.queue_s < LONG_QUEUE_S:
            return NO_CHOICE
        offered = forecast(account, question.demand, question.work, question.fleet, 0.0, question.now)
        is_taken = offered.is_free and no_wait_can_pay(offered, question)
        return Choice(offered if is_taken else None, (offered,))

    def accept(
        self,
        account: NodeAccount,  # noqa: ARG002  # another may be free too
        question: Question,
        known: Sequence[Forecast] = (),
    ) -> Choice:
        """A waiting request takes the best free slot unless another node is worth waiting for. It is the next in the
        queue, so no request waits before it."""
        return self._choose(question, 0.0, known)


def _find_cheapest(free: list[_Option], question: Question) -> list[_Option]:
    """The options of about the least cost. In a lower tier than the best one, a node must be much cheaper."""
    costs = [forecast.total_s for forecast, _ in free]
    tiers = [account.tier for _, account in free]
    if question.demand.preferred_nodes:
        tiers = [question.tier(account) for _, account in free]
    best_tier = min(tiers)
    if best_tier != max(tiers):
        costs = [
            cost if tier == best_tier else cost * TIER_FACTOR + TIER_S for cost, tier in zip(costs, tiers, strict=True)
        ]
    bound = min(costs) * (1.0 + EQUAL_SHARE) + EQUAL_S
    return [option for option, cost in zip(free, costs, strict=True) if cost <= bound]


def _find_least_unread(options: list[_Option], *, has_session: bool) -> list[_Option]:
    """The options with about the smallest unread part of the prompt. ``has_session``: with exactly the smallest part,
    so that a named conversation stays on its node even if it would have little to read on another node."""
    bound = min(forecast.unread_tokens for forecast, _ in options)
    if not has_session:
        bound = bound * EQUAL_UNREAD + EQUAL_UNREAD_TOKENS
    return [option for option in options if option[0].unread_tokens <= bound]


def decide(offered: Forecast, forecasts: list[Forecast], question: Question) -> Choice:
    """Takes the free slot of the forecast ``offered``, unless another node is worth waiting for.

    While requests wait, a slot that stays free costs time for all of them: the longer the queue, the more time. The
    other node gives a part of this time back if it saves work, which is the reading of a prompt.

    A forecast may be wrong again and again. So a request waits at most as long as the free slot would have cost. In the
    worst case it has then lost twice that cost."""
    if question.waited_s >= offered.total_s:
        return Choice(offered, forecasts)
    awaited: Forecast | None = None
    awaited_cost_s = math.inf
    for other in forecasts:
        if not other.is_free:
            if offered.load_s:
                # A load would serve all requests that wait for the model. On average, half of them wait before each
                # one.
                idle_cost_s = question.queue_s / 2.0
            else:
                # The queue loses by the slot that stays free, and gains by the work that is not done twice.
                idle_cost_s = queue_price(question) * question.queue_s * (1.0 - 2.0 * saved_share(offered, other))
            cost_s = other.total_s + idle_cost_s
            is_clearly_better = cost_s * PATIENCE_FACTOR + PATIENCE_S < offered.total_s
            if cost_s < awaited_cost_s and (
                is_clearly_better
                or other.wait_s * SAVING_FACTOR + SAVING_S + idle_cost_s < saved_work_s(offered, other)
            ):
                awaited, awaited_cost_s = other, cost_s
    if awaited is None:
        return Choice(offered, forecasts)
    return Choice(None, forecasts, awaited.wait_s * PATIENCE_FACTOR + PATIENCE_S)


def no_wait_can_pay(offered: Forecast, question: Question) -> bool:
    """Whether ``decide`` would take the free slot, whatever the other nodes have: the queue is so long that an idle
    slot costs more than the best node could save."""
    if offered.load_s:
        return False
    most_saved_s = offered.own_read_s + offered.others_s
    most_saved_share = offered.own_read_s / (offered.own_read_s + offered.write_s)
    idle_cost_s = queue_price(question) * question.queue_s * (1.0 - 2.0 * most_saved_share)
    return idle_cost_s * PATIENCE_FACTOR + PATIENCE_S >= offered.total_s and idle_cost_s + SAVING_S >= most_saved_s


def queue_price(question: Question) -> float:
    return QUEUE_PRICE if question.demand.prompt is None else QUEUE_PRICE_WITH_PROMPTS


def saved_share(offered: Forecast, other: Forecast) -> float:
    """The share of its work that the request would save on the other node, from 0 to 1, because that node has more of
    the prompt in its cache. A faster node saves nothing in this sense, because its time is worth more."""
    unread_saved = max(offered.unread_tokens - other.unread_tokens, 0.0) / offered.unread_tokens
    return unread_saved * offered.own_read_s / (offered.own_read_s + offered.write_s)


def saved_work_s(offered: Forecast, other: Forecast) -> float:
    """The seconds of work that the request would save on the other node, its own and that of others there, because that
    node has more of the prompt in its cache. 0 if that node has no more of the prompt."""
    if other.unread_tokens >= offered.unread_tokens or other.load_s:
        return 0.0
    saved_s = offered.own_read_s - other.own_read_s + offered.others_s - other.others_s
    return min(saved_s, offered.total_s - (other.total_s - other.wait_s))
