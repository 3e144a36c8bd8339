"""What the balancer sees: a ``Demand`` for a request, a ``Candidate`` for a node."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from gpumesh.topology import BackendKind


class Priority(StrEnum):
    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Demand:
    """A request, as far as choosing a node goes. ``kinds`` are the backends that can answer it.

    ``needs_slot`` is false for a request that costs no inference (``show``, ``pull`` …): it neither waits for a slot
    nor takes one. ``session`` names a conversation whose prompt prefix a node may have in its cache. ``id`` is what the
    client calls this request, for ``status``.
    """

    model: str | None
    kinds: frozenset[BackendKind] = frozenset(BackendKind)
    node: str | None = None
    priority: Priority = Priority.NORMAL
    session: str | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    needs_slot: bool = True
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node in the snapshot that a policy ranks.

    ``usable``: tunnel and backend are up, it is not draining, and its breaker is closed. ``models`` is ``None`` when
    the backend could not list them: then any model may be tried. ``queued`` is what other gateways have in flight
    there. ``group`` is equal for nodes that share one GPU: they are balanced as one. ``tokens_per_s`` and ``load_s``
    are by model. ``foreign_load`` is the GPU's utilisation (0 to 1) while we have nothing in flight there; ``rtt_ms``
    is the tunnel's round trip.
    """

    name: str
    kind: BackendKind
    usable: bool
    models: AbstractSet[str] | None
    loaded: AbstractSet[str] = frozenset()
    in_flight: int = 0
    queued: int = 0
    limit: int | None = None
    weight: float = 1.0
    group: str = ""
    tokens_per_s: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    load_s: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    foreign_load: float | None = None
    rtt_ms: float | None = None
    sessions: AbstractSet[str] = frozenset()
