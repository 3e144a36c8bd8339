"""``LookAhead``: which of the next waiting requests a free slot should get. Pure.

Each request has a node where it costs least: the one that has its prompt in the cache, or a fast one. When requests
wait, slots become free one by one. If each went to the first request of the queue, most requests would be served where
their prompt must be read again. So a free slot goes to that one of the next requests that loses least by it. The others
are passed over, but each only so many times.

Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gpumesh.balancer.account import NodeAccount, Work
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.balancer.fairness.lane import QueueEntry
from gpumesh.balancer.policies.base import Policy
from gpumesh.balancer.scheduling.waiting import Group, Waiting

LOOKED_AT = 16  # of the next requests
# A request is passed over at most so many times for each node of the fleet. About one of as many free slots as there
# are nodes is on the node where it costs least.
PASSES_PER_NODE = 8
EQUAL_SHARE = 0.1  # of the time to read the prompt here: who loses less than this loses nothing
WORK_AGE_S = 0.5  # an estimate may be so old: what is in the caches changes slowly


class LookAhead:
    """``accounts`` are all nodes, by name; the owner adds to them. ``policy`` says whether anybody is passed over."""

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
        self._policy = policy

    def __repr__(self) -> str:
        return f"<LookAhead over {LOOKED_AT} requests>"

    def find_next(self, account: NodeAccount, groups: Collection[Group], now: float) -> QueueEntry[Waiting] | None:
        """The waiting request of these groups that should be asked first whether it takes a free slot of this node:
        the next in the queue, or one soon after it that loses less there. ``None``: no request of these groups waits.

        The requests before it are counted as passed over."""
        head = self._queue.best(groups)
        if head is None or head.payload.demand.prompt is None or not self._policy.looks_ahead:
            return head
        entries = self._queue.next_few(head, LOOKED_AT)  # of one group: the node can serve all of them
        most_passes = PASSES_PER_NODE * len(self._accounts)
        picked, least_loss_s = 0, float("inf")
        for index, entry in enumerate(entries):
            waiting = entry.payload
            loss_s = 0.0 if waiting.passes >= most_passes else self._loss_s(waiting, account, now)
            if loss_s < least_loss_s:
                picked, least_loss_s = index, loss_s
                if not loss_s:
                    break
        for entry in entries[:picked]:
            waiting = entry.payload
            waiting.passes += 1
            if waiting.offered_at is None:
                waiting.offered_at = now
        return entries[picked]

    def _loss_s(self, waiting: Waiting, account: NodeAccount, now: float) -> float:
        """How much longer the request takes on this node than on the best of the nodes that have its beginning, or on a
        usual node. 0 if it is hardly longer."""
        work = self._estimate(waiting, now)
        usual, rates = self._experience.fleet_rates, account.rates
        key = waiting.demand.residency
        model = "" if key is None else key.model
        cached = work.cached
        here_s = rates.prefill_s(model, work.prompt_tokens - cached.get(account.name, 0.0))
        elsewhere_s = usual.prefill_s(model, work.prompt_tokens)
        for name, tokens in cached.items():
            if name != account.name:
                other_s = self._accounts[name].rates.prefill_s(model, work.prompt_tokens - tokens)
                elsewhere_s = min(elsewhere_s, other_s)
        loss_s = here_s - elsewhere_s
        loss_s += rates.decode_s(model, work.answer_tokens) - usual.decode_s(model, work.answer_tokens)
        return loss_s if loss_s > EQUAL_SHARE * here_s else 0.0

    def _estimate(self, waiting: Waiting, now: float) -> Work:
        """The work of a waiting request. It is not estimated anew for each slot that becomes free."""
        work = waiting.work
        if work is None or now - waiting.work_at > WORK_AGE_S:
            work = waiting.work = self._experience.estimate(waiting.demand)
            waiting.work_at = now
        return work
