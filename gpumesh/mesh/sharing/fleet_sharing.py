"""``FleetSharing``: tells other gateways what happens to this mesh's nodes, and acts on what they tell.

- A node that has failed at another gateway is checked here at once. Only what this gateway sees itself counts.
- A node that a person has drained at another gateway gets no new requests from this one either, as long as that gateway
  lives. `resume` at this gateway ends that for this gateway.
- A prompt that another gateway has sent to a server counts as one that this server has in its cache.
- Figures that another gateway has learned about a server are taken if this gateway has none, or older ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from socket import gethostname
from typing import Any

import msgspec

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.experience import Experience
from gpumesh.balancer.limits import NodeSlots
from gpumesh.balancer.prefixes import PromptPrint, SharedPromptHasher
from gpumesh.balancer.rates import ServiceRates
from gpumesh.coordination.facts.exchange import FactsChannel, FactsExchange, OwnLoad
from gpumesh.coordination.facts.messages import LearnedFigures, Presence, hash_server
from gpumesh.mesh.learned_state import LearnedState, build_shared_key, restore_figures
from gpumesh.mesh.nodes.drains import DrainElsewhere
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.node import Node
from gpumesh.state import MeshGatewayState, TunnelPhase
from gpumesh.text.printable import printable

MAX_SHOWN_ID_CHARS = 64
MAX_SHOWN_TEXT_CHARS = 60


class _SharedNode:
    """What was told and heard of a node, by its name: a successor of the node has the same drains.

    ``server`` is the id of its server for all gateways; ``None`` until the server was seen. ``is_well``: whether the
    node took requests when this was looked at last; ``None``: not looked at yet. ``drains`` are those that were applied
    to the node, ``resumed`` those that a person has ended here.
    """

    __slots__ = ("drains", "host_key", "is_well", "node", "resumed", "server", "told_at")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.host_key: str | None = None
        self.server: str | None = None
        self.is_well: bool | None = None
        self.drains: frozenset[DrainElsewhere] = frozenset()
        self.resumed: frozenset[DrainElsewhere] = frozenset()
        self.told_at = 0.0
        """When the figures that another gateway has learned were taken, in seconds since 1970, by their own time."""


class FleetSharing:
    """Implements ``MeshFacts`` for the nodes of a mesh.

    ``count_requests`` returns this gateway's requests in flight and in its queue. ``on_change`` is called when the list
    of gateways has changed. ``learned`` is the file with what was learned; ``None``: there is none. ``clock`` returns
    monotonic seconds, ``wall_clock`` seconds since 1970.
    """

    def __init__(
        self,
        mesh_name: str,
        fleet: Fleet,
        channel: FactsChannel,
        *,
        gateway_id: str,
        experience: Experience,
        hasher: SharedPromptHasher,
        count_requests: Callable[[], tuple[int, int]],
        on_change: Callable[[], None],
        learned: LearnedState | None,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._mesh_name = mesh_name
        self._fleet = fleet
        self._id = gateway_id
        self._count_requests = count_requests
        self._on_change = on_change
        self._learned = learned
        self._clock = clock
        self._wall_clock = wall_clock
        self._nodes: dict[str, _SharedNode] = {}
        self._drained: frozenset[str] = frozenset()  # the servers that this gateway has told last
        self._experience = experience
        self._hasher = hasher
        self.exchange = FactsExchange(
            channel,
            self,
            gateway_id=gateway_id,
            host=gethostname(),
            prompt_secret=hasher.secret,
            clock=clock,
            wall_clock=wall_clock,
        )
        experience.on_prompt_placed = self.tell_prompt

    def __repr__(self) -> str:
        return f"<FleetSharing {self._id} {self.exchange!r}>"

    async def run(self) -> None:
        """Exchanges facts until it is cancelled."""
        await self.exchange.run()

    def gateways(self) -> tuple[MeshGatewayState, ...]:
        """All gateways of the mesh, as far as they are heard now; this one first."""
        own = _describe_gateway(self._id, self.exchange.own_presence(), is_own=True)
        others = self.exchange.others.presences().items()
        return (own, *(_describe_gateway(gateway, presence, is_own=False) for gateway, presence in others))

    # -- what happens here -----------------------------------------------------------------------------------------

    def note_changes(self) -> None:
        """Tells the others what has changed. Called after each change of a node: of its reports, its tunnel, its
        breaker and its drains."""
        has_new_server = False
        for shared in self._follow_nodes():
            node = shared.node
            if node.host_key != shared.host_key and node.host_key is not None:
                shared.host_key, has_new_server = node.host_key, True
                shared.server = hash_server(self._mesh_name, build_shared_key(node.host_key))
            was_well, shared.is_well = shared.is_well, node.reachable and node.ledger.breaker.open_until is None
            if was_well is not None and was_well != shared.is_well and shared.server is not None:
                self.exchange.tell_server_change(shared.server, is_up=shared.is_well)
        drained = self._find_drained()
        if drained != self._drained:
            self._drained = drained
            self.exchange.send_presence()
        if has_new_server:
            self.exchange.note_new_server()
            self._apply_drains()

    def _follow_nodes(self) -> Iterator[_SharedNode]:
        """Yields what is known of each node of the mesh. A node with the name of an earlier one is a successor."""
        nodes = {node.name: node for node in self._fleet}
        for name in self._nodes.keys() - nodes.keys():
            del self._nodes[name]
        for name, node in nodes.items():
            shared = self._nodes.get(name)
            if shared is None:
                shared = self._nodes[name] = _SharedNode(node)
            elif shared.node is not node:
                shared.node, shared.host_key, shared.server, shared.is_well = node, None, None, None
            yield shared

    def _find_drained(self) -> frozenset[str]:
        """The servers of the nodes that a person has drained here. A node that has left the mesh is not among them,
        although it gets no requests either."""
        shared_nodes = list(self._follow_nodes())
        return frozenset(shared.server for shared in shared_nodes if shared.server and shared.node.role.drained)

    def own_load(self) -> OwnLoad:
        in_flight, queued = self._count_requests()
        return OwnLoad(in_flight, queued, self._find_drained())

    # -- what happens elsewhere ------------------------------------------------------------------------------------

    def note_gateways(self) -> None:
        self._apply_drains()
        self._on_change()

    def _apply_drains(self) -> None:
        """Applies the drains of other gateways to the nodes here, and ends those that hold no more."""
        drains = self.exchange.others.drains()
        for shared in list(self._nodes.values()):
            role = shared.node.role
            applied = frozenset(hold for hold in role.drain_holds if isinstance(hold, DrainElsewhere))
            wanted = frozenset(
                DrainElsewhere(gateway, printable(host, MAX_SHOWN_TEXT_CHARS))
                for gateway, host in drains.get(shared.server or "", {}).items()
            )
            # A drain that is gone from the node was ended by a person (``Mesh.resume``).
            shared.resumed = (shared.resumed | (shared.drains - applied)) & wanted
            shared.drains = wanted - shared.resumed
            if shared.drains != applied:
                role.drain_holds = {*(role.drain_holds - applied), *shared.drains}
                shared.node.announce_change()

    def check_server(self, server: str, *, is_up: bool) -> None:
        for shared in self._nodes.values():
            if shared.server != server or shared.node.reachable == is_up:
                continue
            node = shared.node
            if is_up and node.tunnel is not None and node.tunnel_state.state is TunnelPhase.BACKOFF:
                node.tunnel.retry_now()
            else:
                node.check_now("it has failed at another gateway")

    # -- prompts ---------------------------------------------------------------------------------------------------

    def tell_prompt(self, node: str, key: ResidencyKey, prompt: PromptPrint) -> None:
        """Tells the others that the prompt was sent to this node."""
        shared = self._nodes.get(node)
        if shared is not None and shared.server is not None:
            self.exchange.tell_prompt(shared.server, key, prompt)

    def note_prompt(self, server: str, key: ResidencyKey, prompt: PromptPrint) -> None:
        for name, shared in self._nodes.items():
            if shared.server == server:
                self._experience.prefixes.add(name, key, prompt, self._clock())

    def note_prompt_secret(self, secret: bytes) -> None:
        self._hasher.replace_secret(secret)
        for name in self._nodes:  # nothing could be compared with what is known
            self._experience.prefixes.forget(name)

    # -- what was learned ------------------------------------------------------------------------------------------

    def _learned_at(self, shared: _SharedNode) -> float:
        """The time of what this gateway knows of the server's speed, in seconds since 1970; 0 if it knows nothing."""
        node = shared.node
        if math.isfinite(node.account.learned_at):  # it was measured since this gateway began
            return self._wall_clock() - (self._clock() - node.account.learned_at)
        saved_at = None if self._learned is None else self._learned.saved_at(node)
        return max(saved_at or 0.0, shared.told_at)

    def learned_times(self) -> Mapping[str, float]:
        return {shared.server: self._learned_at(shared) for shared in self._nodes.values() if shared.server is not None}

    def find_learned(self, server: str) -> LearnedFigures | None:
        for shared in self._nodes.values():
            node = shared.node
            rates, limits = node.rates, node.learned_slots.as_dict()
            if shared.server != server or (rates.is_empty and not limits):
                continue
            try:
                raw_rates = msgspec.Raw(msgspec.json.encode(rates.as_dict()))
                raw_limits = msgspec.Raw(msgspec.json.encode(limits))
            except UnicodeEncodeError:  # the name of a model has a lone surrogate, which JSON cannot hold
                continue
            version = None if node.server_version is None else printable(node.server_version, MAX_SHOWN_TEXT_CHARS)
            return LearnedFigures(server, self._learned_at(shared), version, raw_rates, raw_limits)
        return None

    def take_learned(self, figures: LearnedFigures) -> None:
        for shared in self._nodes.values():
            if shared.server == figures.server and figures.learned_at > self._learned_at(shared):
                self._restore(shared, figures)

    def _restore(self, shared: _SharedNode, figures: LearnedFigures) -> None:
        """Gives the node newer figures of the models that its server lists. What was measured since this gateway began
        stays; what was stored before does not. Damaged figures are ignored."""
        node, now = shared.node, self._clock()
        trial = _Trial(node)
        try:
            restore_figures(trial, figures.rates, figures.limits, server_version=figures.server_version, now=now)
        except ValueError:
            return
        limits = _keep_listed(trial.learned_slots.as_dict(), node)
        rates = {
            part: _keep_listed(values, node) if isinstance(values, dict) else values
            for part, values in trial.rates.as_dict().items()
        }
        if math.isfinite(node.account.learned_at) or node.account.placed:  # in use since this gateway began
            node.rates.restore(rates)
            node.learned_slots.restore(limits, now=now)
        else:
            node.rates.replace(rates)
            node.learned_slots.replace_idle(limits, now=now)
        shared.told_at = min(figures.learned_at, self._wall_clock())  # the other clock may be ahead


class _Trial:
    """Stands for a node while figures are read."""

    def __init__(self, node: Node) -> None:
        self.host_key = node.host_key
        self.server_version = node.server_version
        self.rates = ServiceRates()
        self.learned_slots = NodeSlots()


def _keep_listed(values: dict[str, Any], node: Node) -> dict[str, Any]:
    """The values of the models that the node's server lists. Others would push out what was measured here."""
    listed = node.account.models
    return {model: value for model, value in values.items() if listed is None or model in listed}


def _describe_gateway(gateway: str, presence: Presence, *, is_own: bool) -> MeshGatewayState:
    """The gateway as people see it. What another gateway has sent becomes safe to print."""
    return MeshGatewayState(
        id=printable(gateway, MAX_SHOWN_ID_CHARS),
        host=printable(presence.host, MAX_SHOWN_TEXT_CHARS),
        pid=presence.pid,
        version=printable(presence.version, MAX_SHOWN_TEXT_CHARS),
        since=datetime.fromtimestamp(presence.since, UTC),
        in_flight=presence.in_flight,
        queued=presence.queued,
        own=is_own,
    )
