"""The policies that look at loads only. They know nothing of models in memory, prompts and lengths.

But if a client names its conversation, each policy chooses the node that had the conversation's last request, as long
as this node has a free slot.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.forecast import Forecast
from gpumesh.balancer.policies.base import NO_CHOICE, Choice, Question, nodes_with_room


class _SimplePolicy:
    """Chooses among the nodes with a free slot."""

    ranks_all = True
    looks_ahead = False

    def choose(self, question: Question) -> Choice:
        free = nodes_with_room(question)
        if not free:
            return NO_CHOICE
        chosen = question.forecast(_find_session_node(free, question) or self._pick(free, question))
        return Choice(chosen, (chosen,))

    def accept_at_once(self, account: NodeAccount, question: Question) -> Choice:  # noqa: ARG002
        return NO_CHOICE

    def accept(
        self,
        account: NodeAccount,  # noqa: ARG002  # another may be free too
        question: Question,
        known: Sequence[Forecast] = (),  # noqa: ARG002
    ) -> Choice:
        """Chooses anew among all nodes: another node may have got a free slot too."""
        return self.choose(question)

    def _pick(self, free: Sequence[NodeAccount], question: Question) -> NodeAccount:
        raise NotImplementedError


def _find_session_node(free: Sequence[NodeAccount], question: Question) -> NodeAccount | None:
    """The node that had the last request of this session, if that node is free."""
    if question.demand.session is None:  # most requests
        return None
    name = question.fleet.experience.find_session_node(question.demand)
    return next((account for account in free if account.name == name), None)


class RoundRobin(_SimplePolicy):
    """Takes the nodes in turn, by name."""

    def _pick(self, free: Sequence[NodeAccount], question: Question) -> NodeAccount:
        return sorted(free, key=lambda account: account.name)[question.turn % len(free)]


class LeastLoaded(_SimplePolicy):
    """Takes the node with the fewest requests for its slots and its weight."""

    def _pick(self, free: Sequence[NodeAccount], question: Question) -> NodeAccount:
        start = question.turn % len(free)
        return min((*free[start:], *free[:start]), key=lambda account: relative_load(account, question))


class PowerOfTwo(LeastLoaded):
    """Takes the less loaded of two nodes that are drawn at random. So if many gateways see the same outdated loads,
    they do not all choose the same node.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """

    ranks_all = False  # two nodes of a shortlist, which is random too, are as good

    def _pick(self, free: Sequence[NodeAccount], question: Question) -> NodeAccount:
        return super()._pick(free if len(free) <= 2 else question.rng.sample(free, 2), question)


def relative_load(account: NodeAccount, question: Question) -> float:
    """The requests in flight on the node's GPU for each slot, divided by the node's weight. A node without a limit
    counts as a node with one slot."""
    slots = account.slots(question.model or "", question.now) or 1
    return account.count() / (slots * account.weight)
