"""``Roster``: the nodes of a scheduler, which come, change and go while it works. Pure."""

from __future__ import annotations

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.forecast import Copies
from gpumesh.balancer.scheduling.node_choice import NodeChoice
from gpumesh.balancer.scheduling.slow_nodes import SlowNodes
from gpumesh.balancer.scheduling.waiting import Pauses


class Roster:
    """Adds to ``accounts`` and removes from it, and keeps what the other parts of the scheduler know of the nodes in
    step with it. ``changed`` are the nodes that may have got a free slot."""

    def __init__(
        self,
        accounts: dict[str, NodeAccount],
        experience: Experience,
        choice: NodeChoice,
        slow_nodes: SlowNodes,
        copies: Copies,
        pauses: Pauses,
        changed: dict[str, NodeAccount],
    ) -> None:
        self._accounts = accounts
        self._experience = experience
        self._shortlist = choice.shortlist
        self._slow_nodes = slow_nodes
        self._copies = copies
        self._pauses = pauses
        self._changed = changed

    def __repr__(self) -> str:
        return f"<Roster {', '.join(self._accounts)}>"

    def add(self, name: str, *, weight: float = 1.0, tier: int = 1, max_parallel: int | None = None) -> NodeAccount:
        """Adds a node, and returns its account. ``weight``, ``tier`` and ``max_parallel`` are those of mesh.yaml."""
        account = NodeAccount(
            name, weight=weight, tier=tier, max_parallel=max_parallel, fleet_rates=self._experience.fleet_rates
        )
        self._accounts[name] = account
        self._shortlist.note_added(account)
        return account

    def remove(self, account: NodeAccount) -> None:
        """Takes a node out. The requests that it has go on, but nothing is learned from them any more. Another node may
        have its name from now on."""
        account.is_removed, account.is_up = True, False
        name = account.name
        self._slow_nodes.forget(name)
        del self._accounts[name]
        self._changed.pop(name, None)
        self._pauses.end(name)
        self._shortlist.clear()
        self._copies.remove(name)
        self._experience.prefixes.forget(name)
