"""Makes what a mesh needs to share facts with other gateways; in a mesh without `redis`, what needs no others."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from gpumesh.balancer.prefixes import PromptHasher, SharedPromptHasher
from gpumesh.balancer.prefixes.prints import MIN_SECRET_BYTES
from gpumesh.coordination.exchange import Exchange
from gpumesh.coordination.facts.exchange import FactsExchange
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.node_factory import NodeFactory
from gpumesh.mesh.sharing.fleet_sharing import FleetSharing
from gpumesh.state import MeshGatewayState
from gpumesh.topology import Topology

TOPIC = "facts"


def make_prompt_hasher(topology: Topology) -> PromptHasher:
    """The hasher of all prompts of a mesh. Without `redis` in mesh.yaml it is the quicker one."""
    secret = secrets.token_bytes(MIN_SECRET_BYTES)
    return PromptHasher(secret) if topology.redis is None else SharedPromptHasher(secret)


class _Channel:
    """The messages with facts, among all messages of gateways."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._others: frozenset[str] = frozenset()  # the other gateways at the last look

    @property
    def is_connected(self) -> bool:
        return self._exchange.is_connected

    def send(self, text: str) -> None:
        self._exchange.send(TOPIC, text)

    def pass_on(self, facts: FactsExchange) -> None:
        """Passes on to ``facts`` what comes from now on."""
        self._exchange.listen(TOPIC, facts.receive)
        self._exchange.follow_facts(lambda: self._note_gateways(facts))

    def _note_gateways(self, facts: FactsExchange) -> None:
        """Notes which gateways have begun and ended. While Redis is away, that is not known."""
        if not self._exchange.is_connected:
            return
        before, self._others = self._others, self._exchange.other_gateways()
        for gateway in before - self._others:
            facts.note_gone(gateway)
        if self._others - before:  # each presence of an unknown gateway is answered at once
            facts.send_presence()


class NoSharing:
    """Stands for ``FleetSharing`` in a mesh without other gateways."""

    async def run(self) -> None:
        """Returns at once."""

    def gateways(self) -> tuple[MeshGatewayState, ...]:
        return ()

    def note_changes(self) -> None:
        pass


def share_fleet(
    topology: Topology,
    fleet: Fleet,
    parts: NodeFactory,
    hasher: PromptHasher,
    count_requests: Callable[[], tuple[int, int]],
) -> FleetSharing | NoSharing:
    """Makes the sharing of a mesh; ``NoSharing`` without `redis` in mesh.yaml. ``hasher`` makes the prints of all its
    prompts (``make_prompt_hasher``). ``count_requests`` returns this gateway's requests in flight and in its queue."""
    if topology.redis is None or not isinstance(hasher, SharedPromptHasher):
        return NoSharing()
    exchange = parts.coordination.exchange
    channel = _Channel(exchange)
    sharing = FleetSharing(
        topology.name,
        fleet,
        channel,
        gateway_id=exchange.gateway,
        experience=parts.scheduler.experience,
        hasher=hasher,
        count_requests=count_requests,
        on_change=parts.changes.notify,
        learned=parts.learned,
        clock=parts.clock,
    )
    channel.pass_on(sharing.exchange)
    return sharing
