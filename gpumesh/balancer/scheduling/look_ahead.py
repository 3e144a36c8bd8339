"""``LookAhead``: which of the next waiting requests a free slot should get. Pure.

Each request has a node where it costs least: the node that has its prompt in the cache, or a fast node. When requests
wait, slots become free one by one. If each slot went to the first request of the queue, most prompts would be read
again on a new node. So a free slot goes to the request that loses least there, among the next requests. The requests
before it are passed over, but each of them only a limited number of times.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import islice

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.policies.base import Policy
from gpumesh.balancer.rates.service_rates import Pace
from gpumesh.balancer.scheduling.waiting import Group, Waiting
from gpumesh.balancer.work import Work

LOOKED_AT = 16  # of the next requests
# A request is passed over at most this number of times for each node of the fleet. Among as many free slots as there
# are nodes, about one slot is on the node where the request costs least.
PASSES_PER_NODE = 8
EQUAL_SHARE = 0.1  # of the cost on this node: a request that loses no more takes the slot
WORK_AGE_S = 0.5  # an older estimate is made again; the content of the caches changes slowly
_OTHER_NODE = ""  # stands for a usual node of the fleet that has nothing of the prompt in its cache


class LookAhead:
    """``accounts`` are all nodes, by name; the owner adds to them. ``policy`` says whether requests are passed over at
    all."""

    def __init__(
        self,
        accounts: Mapping[str, NodeAccount],
        experience: Experience,
        queue: FairQueue[Waiting],
        policy: Policy,
    ) -> None:
        self._accounts = accounts
        self._experience = experience
        self._queue = queue
        self.policy = policy

    def __repr__(self) -> str:
        return f"<LookAhead over {LOOKED_AT} requests>"

    def find_next(
        self, account: NodeAccount, groups: Collection[Group], now: float
    ) -> tuple[QueueEntry[Waiting], Work] | None:
        """The waiting request of these groups to which a free slot of this node is offered first, and its work, as it
        is estimated now: the next request of the queue, or one of the requests after it that loses less there.
        ``None``: no request of these groups waits.

        Counts a pass for each request before it."""
        head = self._queue.best(groups)
        if head is None:
            return None
        if head.payload.demand.prompt is None or not self.policy.looks_ahead:
            return head, self._experience.estimate(head.payload.demand)
        most_passes = PASSES_PER_NODE * len(self._accounts)
        key = head.payload.demand.residency
        model = "" if key is None else key.model
        name, pace = account.name, account.rates.pace(model)
        token_s, read_token_s = pace.token_s, pace.read_token_s
        picked, least_loss_s = 0, math.inf
        new_work: Work | None = None  # of the picked request, if it was estimated just now
        entries: list[QueueEntry[Waiting]] = []
        for entry in islice(self._queue.iterate_from(head), LOOKED_AT):  # of one group: the node can serve all of them
            waiting = entry.payload
            entries.append(entry)
            if waiting.passes >= most_passes:
                picked, new_work = len(entries) - 1, None
                break
            work = waiting.work
            is_old = work is None or now - waiting.estimated_at > WORK_AGE_S
            if work is None or is_old:
                work = self._estimate(waiting, model, now)
            # This is ``_cost_s``. It is written out because it is needed for up to LOOKED_AT requests.
            unread_tokens = work.prompt_tokens - work.cached.get(name, 0.0) if work.cached else work.prompt_tokens
            here_s = unread_tokens * read_token_s + work.answer_tokens * token_s
            loss_s = here_s - waiting.best_s
            if loss_s < least_loss_s:
                picked, least_loss_s, new_work = len(entries) - 1, loss_s, work if is_old else None
                if loss_s <= EQUAL_SHARE * here_s:
                    break
        for entry in entries[:picked]:
            waiting = entry.payload
            waiting.passes += 1
            if waiting.offered_at is None:
                waiting.offered_at = now
        picked_entry = entries[picked]
        return picked_entry, new_work or self._experience.estimate(picked_entry.payload.demand)

    def _estimate(self, waiting: Waiting, model: str, now: float) -> Work:
        """Estimates the work of a waiting request, and its least cost: on a usual node, or on a node that has a part of
        its prompt in the cache."""
        work = waiting.work = self._experience.estimate(waiting.demand)
        waiting.estimated_at = now
        waiting.best_s = _cost_s(work, _OTHER_NODE, self._experience.fleet_rates.pace(model))
        for name in work.cached:
            cost_s = _cost_s(work, name, self._accounts[name].rates.pace(model))
            waiting.best_s = min(waiting.best_s, cost_s)
        return work


def _cost_s(work: Work, node: str, pace: Pace) -> float:
    """The seconds for this work on ``node`` (for the cache of prompts) at this pace, without other requests there."""
    cached = work.cached
    unread_tokens = work.prompt_tokens - cached.get(node, 0.0) if cached else work.prompt_tokens
    return unread_tokens * pace.read_token_s + work.answer_tokens * pace.token_s
