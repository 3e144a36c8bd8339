"""``adaptive``: the node where the request costs least, to itself and to others. It may be worth waiting for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.forecast import Forecast, forecast
from gpumesh.balancer.policies.base import NO_CHOICE, Choice, Question
from gpumesh.balancer.policies.simple import relative_load

# A request waits for a busy node only if that is clearly better than a free one: so many times, and so many seconds
# more. A forecast may be wrong, and a free slot that nobody takes is lost.
PATIENCE_FACTOR = 1.5
PATIENCE_S = 0.5
# A node that saves work, because it has the prompt in its cache, is worth a wait of which so many times, and so many
# seconds more, are less than the work that it saves. That work is known better than the rest of a forecast.
SAVING_FACTOR = 1.5
SAVING_S = 0.05
# What a free slot that nobody takes costs, in waits for the queue as it is.
QUEUE_PRICE = 3.5
# … where the prompts of requests are known. The next free slot then goes to a request that loses little there.
QUEUE_PRICE_WITH_PROMPTS = 2.0
# With a shorter queue, few answers are so short that the other nodes need not be looked at.
LONG_QUEUE_S = 1.0
# A node of a lower tier is better than a free one of an upper tier only if it is so much faster.
TIER_FACTOR = 3.0
TIER_S = 1.0
# Costs that differ by less are equal: what must be read of the prompt then decides, the loads, and the turn. Forecasts
# are not more exact.
EQUAL_SHARE = 0.02
EQUAL_S = 0.01
# Unread parts of a prompt that differ by less, by this factor and by some tokens, are equal too.
EQUAL_UNREAD = 1.25
EQUAL_UNREAD_TOKENS = 32.0


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
            known_of = {found.node: found for found in known}
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
        rooms = zip(question.accounts, forecasts, strict=True)
        blocked_s = [found.wait_s for account, found in rooms if account.has_room(question.model, question.now)]
        return Choice(None, forecasts, max(min(blocked_s) - queue_s, 0.0) if blocked_s else None)

    def _best_free(self, forecasts: list[Forecast], question: Question) -> Forecast | None:
        """The best of the nodes with a free slot; ``None`` if there is none."""
        free = [(found, account) for found, account in zip(forecasts, question.accounts, strict=True) if found.is_free]
        if len(free) < 2:
            return free[0][0] if free else None
        costs = [found.total_s for found, _ in free]
        tiers = [account.tier for _, account in free]
        if question.demand.preferred_nodes:
            tiers = [question.tier(account) for _, account in free]
        best_tier = min(tiers)
        if best_tier != max(tiers):
            costs = [
                cost if tier == best_tier else cost * TIER_FACTOR + TIER_S
                for cost, tier in zip(costs, tiers, strict=True)
            ]
        bound = min(costs) * (1.0 + EQUAL_SHARE) + EQUAL_S
        equal = [pair for pair, cost in zip(free, costs, strict=True) if cost <= bound]
        demand = question.demand
        if len(equal) > 1 and (demand.prompt is not None or demand.session is not None):
            most_unread = min(found.unread_tokens for found, _ in equal)
            if demand.session is None:  # a named conversation stays on its node even if little is read elsewhere
                most_unread = most_unread * EQUAL_UNREAD + EQUAL_UNREAD_TOKENS
            equal = [pair for pair in equal if pair[0].unread_tokens <= most_unread]
        if len(equal) == 1:
            return equal[0][0]
        start = question.turn % len(equal)
        found, account = equal[start]
        if account.is_idle:  # no other can be less loaded
            return found
        return min((*equal[start:], *equal[:start]), key=lambda pair: relative_load(pair[1], question))[0]

    def accept_at_once(self, account: NodeAccount, question: Question) -> Choice:
        """The longer the queue is, the more often the slot is taken whatever the other nodes have."""
        if question.queue_s < LONG_QUEUE_S:
            return NO_CHOICE
        offered = forecast(account, question.demand, question.work, question.fleet, 0.0, question.now)
        is_taken = offered.is_free and no_wait_pays(offered, question)
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


def decide(offered: Forecast, forecasts: list[Forecast], question: Question) -> Choice:
    """Takes the free slot that ``offered`` is about, unless another node is worth waiting for.

    While requests wait, a slot that is left free costs all of them time, and the more the longer the queue is. They get
    that time back only so far as the other node saves work: the reading of a prompt.

    A forecast may be wrong again and again. So a request waits at most as long as the free slot would have cost: then
    it has lost twice that cost at the worst."""
    if question.waited_s >= offered.total_s:
        return Choice(offered, forecasts)
    awaited: Forecast | None = None
    awaited_cost_s = math.inf
    for found in forecasts:
        if not found.is_free:
            if offered.load_s:
                # A load would serve all requests that wait for the model. On the mean, they wait for half the others.
                idle_cost_s = question.queue_s / 2.0
            else:
                # The queue loses by the slot that stays free, and gains by the work that is not done twice.
                idle_cost_s = queue_price(question) * question.queue_s * (1.0 - 2.0 * saved_share(offered, found))
            cost_s = found.total_s + idle_cost_s
            if cost_s < awaited_cost_s and (
                cost_s * PATIENCE_FACTOR + PATIENCE_S < offered.total_s
                or found.wait_s * SAVING_FACTOR + SAVING_S + idle_cost_s < saved_work_s(offered, found)
            ):
                awaited, awaited_cost_s = found, cost_s
    if awaited is None:
        return Choice(offered, forecasts)
    return Choice(None, forecasts, awaited.wait_s * PATIENCE_FACTOR + PATIENCE_S)


def no_wait_pays(offered: Forecast, question: Question) -> bool:
    """Whether ``decide`` would take the free slot whatever other nodes there are. The queue is then so long that a slot
    which stays free costs more than the best node could save."""
    if offered.load_s:
        return False
    most_saved_s = offered.own_read_s + offered.others_s
    most_share = offered.own_read_s / (offered.own_read_s + offered.write_s)
    idle_cost_s = queue_price(question) * question.queue_s * (1.0 - 2.0 * most_share)
    return idle_cost_s * PATIENCE_FACTOR + PATIENCE_S >= offered.total_s and idle_cost_s + SAVING_S >= most_saved_s


def queue_price(question: Question) -> float:
    return QUEUE_PRICE if question.demand.prompt is None else QUEUE_PRICE_WITH_PROMPTS


def saved_share(offered: Forecast, other: Forecast) -> float:
    """Which share of its work the request would save on the other node, from 0 to 1, because that node has more of its
    prompt in its cache. That a node is faster is no saving: its time is worth more."""
    unread_saved = max(offered.unread_tokens - other.unread_tokens, 0.0) / offered.unread_tokens
    return unread_saved * offered.own_read_s / (offered.own_read_s + offered.write_s)


def saved_work_s(offered: Forecast, other: Forecast) -> float:
    """The seconds of work that the request would save on the other node, its own and that of others there, because that
    node has more of its prompt in its cache. 0 if it has not."""
    if other.unread_tokens >= offered.unread_tokens or other.load_s:
        return 0.0
    saved_s = offered.own_read_s - other.own_read_s + offered.others_s - other.others_s
    return min(saved_s, offered.total_s - (other.total_s - other.wait_s))
