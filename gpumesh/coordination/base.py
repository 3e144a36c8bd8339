"""``Coordination``: the interface through which a mesh shares the places of its nodes with other gateways.

A **place** is the right to have one request on the GPUs of a key. ``key`` names GPUs, and every gateway that reaches
these GPUs has the same key for them (``gpumesh.mesh.nodes.snapshot.coordination_key``).

How a mesh uses it for a request that takes a slot:

1. It places the request, and calls ``take_now``. ``True``: the request holds a place. ``None``: the mesh awaits
   ``take``, which asks the other gateways.
2. If the place is denied, the request waits in the queue. The mesh calls ``announce`` with the best waiting request of
   each class for this key, whenever these have changed.
3. When ``on_change`` is called with the key, the mesh places waiting requests as ``others_in_flight`` now allows. It
   must do so before ``on_change`` returns: a place that was granted and not taken by then is given back.
4. When the request has ended, the mesh calls ``release``, exactly once for each place that was taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpumesh.balancer.base import Priority
from gpumesh.coordination.exchange import Exchange
from gpumesh.state import Finding


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """A request that needs a place, or waits for one.

    - ``limit``: the request gets a place only while all gateways together hold fewer places of the key than this;
      ``None``: any number. If a node counts its slots for each model, the mesh adds its own requests to other models.
    - ``client`` is the client's name. It leaves this process only as a hash.
    - ``waited_s``: the seconds since the request came. Not a time, because the clocks of gateways differ.
    - ``cost``: the expected cost in weighted tokens (``gpumesh.balancer.fairness.client_counters``).
    """

    limit: int | None
    priority: Priority
    client: str
    waited_s: float
    cost: float


class Coordination(Protocol):
    """Shares places with other gateways while ``run`` runs. Only ``take`` and ``run`` wait.

    Without other gateways, and while they cannot be asked, each method answers as ``SingleGateway`` does.
    """

    @property
    def exchange(self) -> Exchange:
        """What gateways tell each other beside their places."""

    def take_now(self, key: str) -> bool | None:
        """Takes a place without waiting. ``True``: this gateway holds one place more. It is so while no other gateway
        uses the key, while the others cannot be asked, and after a grant in ``on_change``, for as many calls as there
        were grants. ``None``: ``take`` must be awaited. (``False`` would mean that there is no place; no
        implementation says so without asking.)"""

    async def take(self, key: str, request: PlaceRequest) -> bool:
        """Asks for a place, for at most about half a second. Returns whether this gateway holds one place more. Raises
        only CancelledError; the place is then given back if it was granted."""

    def hold(self, key: str) -> None:
        """Counts one place more without asking, also beyond the limit: a request that runs already was counted under
        another key, and is released there."""

    def release(self, key: str, priority: Priority, client: str, cost_correction: float = 0.0) -> None:
        """Gives a place back. ``cost_correction``: the true cost of the request minus the expected one, in weighted
        tokens; minus the expected cost if the server gave nothing."""

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:
        """Returns the number that the scheduler must add to ``own``, its own requests on the GPUs of the key, so that
        they have room for one more only if a place can be asked for or was granted. Mostly it is the number of places
        of other gateways. Places that this gateway has just given back count until the others know."""

    def announce(self, key: str, heads: Sequence[PlaceRequest]) -> None:
        """Tells the best waiting request of each class that a place of the key would suit; empty: none waits. Replaces
        what was announced for the key. It is sent only if it has changed, and costs nothing while no other gateway
        uses the key."""

    def shared_keys(self) -> Collection[str]:
        """Returns the keys that other gateways use too: only these need announcements. When a key becomes shared,
        ``on_change`` is called with it."""

    def findings(self) -> tuple[Finding, ...]:
        """Returns the reasons why places are not shared now; empty when they are."""

    async def run(self) -> None:
        """Shares places until it is cancelled; returns at once where there are no other gateways. Raises no error that
        another gateway or Redis causes."""
