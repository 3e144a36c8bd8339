"""Loads models that mesh.yaml wants in memory (``copies``, ``nodes``, ``pinned`` of a model), where they are missing.

``find_next_load`` decides, without I/O. ``ModelPlacement`` looks at the nodes after their first reports, and then every
``CHECK_INTERVAL_S``; it loads one model at a time. It only adds what is missing: it unloads nothing by itself, and it
waits for nodes that are busy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpumesh.backends.dialects import KINDS_WITH_MODEL_STORE
from gpumesh.balancer.base import ResidencyKey
from gpumesh.errors import GPUMeshError
from gpumesh.mesh.models.inventory import is_embedder_on
from gpumesh.mesh.models.model_store import ModelStore, over_mesh
from gpumesh.text.model_names import full_name
from gpumesh.topology import ModelSpec

if TYPE_CHECKING:
    from gpumesh.mesh.mesh import Mesh
    from gpumesh.mesh.nodes.node import Node

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 30.0
FIRST_REPORT_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 600.0  # a large model from a slow disk takes minutes
RETRY_S = 600.0  # so long after a failed load, the same model is not loaded on the same node again
# How long the model stays in memory without use. Ollama's own 5 minutes would unload it again and again. It is not
# "for ever", so that the memory is free some time after the mesh has ended.
KEEP_ALIVE = "1h"
RECENT_USE_S = 300.0  # a model that was used within this time is not pushed out
AWAY_S = 60.0  # a node's copies count for so long after the node went away; only then are they replaced
FOREIGN_LOAD = 0.3  # a node is busy if other programs use more than this share of its GPU


@dataclass(frozen=True, slots=True)
class PlacementNode:
    """A node as the decision sees it. All models are full names in the mesh.

    - ``is_idle``: the node can be used now, has a model store, and is not busy with requests or a load.
    - ``models``: the models on its disk. ``loaded``: the models in its memory, and those that it loads now.
    - ``used``: the models that were used lately.
    - ``pushed_out``: for each wanted model that is not loaded there, the models that its load would push out.
    - ``failed``: the models that could not be loaded there a short time ago.
    """

    name: str
    is_idle: bool
    models: AbstractSet[str] = frozenset()
    loaded: AbstractSet[str] = frozenset()
    used: AbstractSet[str] = frozenset()
    pushed_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    failed: AbstractSet[str] = frozenset()
    tier: int = 1


@dataclass(frozen=True, slots=True)
class NextLoad:
    """A model to load on a node. ``model`` is its name in mesh.yaml, which wants ``wanted`` copies; ``present`` are in
    memory now. ``pushed_out`` are the models that the load pushes out. ``context`` is in tokens; ``None``: the server's
    default."""

    model: str
    node: str
    present: int
    wanted: int
    pushed_out: Sequence[str] = ()
    context: int | None = None


def find_next_load(specs: Sequence[ModelSpec], nodes: Sequence[PlacementNode]) -> NextLoad | None:
    """The first copy that is missing and can be loaded now; ``None`` if there is none. Models come in the order of
    mesh.yaml, pinned models first.

    A load never pushes out a pinned model, a model that was used lately, or a copy that mesh.yaml wants too."""
    kept = {full_name(spec.name) for spec in specs if spec.pinned} | _wanted_without_surplus(specs, nodes)
    for spec in sorted(specs, key=lambda spec: not spec.pinned):
        model = full_name(spec.name)
        allowed = _allowed_nodes(spec, nodes)
        present = sum(model in node.loaded for node in allowed)
        if spec.wanted_copies is None or present >= spec.wanted_copies:
            continue
        candidates = [node for node in allowed if _can_load(node, model, kept)]
        if candidates:
            # A preferred node, else one of the lowest tier, else one where the fewest models must go.
            best = min(
                candidates,
                key=lambda node: (node.name not in spec.prefer, node.tier, len(node.pushed_out.get(model, ()))),
            )
            pushed_out = tuple(best.pushed_out.get(model, ()))
            # The contexts of requests are rounded up to these steps. With a context that is no step, the server would
            # load the model again for the first request.
            context = spec.context_steps[0] if spec.context_steps else None
            return NextLoad(spec.name, best.name, present, spec.wanted_copies, pushed_out, context)
    return None


def _wanted_without_surplus(specs: Sequence[ModelSpec], nodes: Sequence[PlacementNode]) -> set[str]:
    """The models of which all copies in memory are wanted by mesh.yaml. (Other models have more copies than wanted, so
    that one copy may go.)"""
    kept: set[str] = set()
    for spec in specs:
        model = full_name(spec.name)
        present = sum(model in node.loaded for node in _allowed_nodes(spec, nodes))
        if spec.wanted_copies is not None and present <= spec.wanted_copies:
            kept.add(model)
    return kept


def _allowed_nodes(spec: ModelSpec, nodes: Sequence[PlacementNode]) -> list[PlacementNode]:
    return [node for node in nodes if spec.nodes is None or node.name in spec.nodes]


def _can_load(node: PlacementNode, model: str, kept: AbstractSet[str]) -> bool:
    """Whether the model is missing in this node's memory, and may be loaded there now: its load pushes out no model in
    ``kept``, and none that was used lately."""
    if not node.is_idle or model not in node.models or model in node.loaded or model in node.failed:
        return False
    return not any(other in kept or other in node.used for other in node.pushed_out.get(model, ()))


class ModelPlacement:
    """Keeps the wanted copies of a running mesh in memory. ``clock`` is the mesh's."""

    def __init__(self, mesh: Mesh, *, clock: Callable[[], float]) -> None:
        self._mesh = mesh
        self._clock = clock
        self._changed = asyncio.Event()  # mesh.yaml may want other copies than before
        self._failed_until: dict[tuple[str, str], float] = {}  # by node and model: not loaded again before this time
        self._away_since: dict[str, float] = {}  # by node, for the nodes that are away

    def __repr__(self) -> str:
        return f"<ModelPlacement {len(self._wanted)} models, {len(self._failed_until)} failed loads>"

    @property
    def _wanted(self) -> list[ModelSpec]:
        """The models of which mesh.yaml wants copies now."""
        return [spec for spec in self._mesh.topology.models if spec.wanted_copies]

    def note_change(self) -> None:
        """The mesh has another topology: looks at once for what is missing."""
        self._changed.set()

    async def run(self, *, interval_s: float = CHECK_INTERVAL_S) -> None:
        """Loads what is missing, until it is cancelled. Looks every ``interval_s`` seconds, and at each change of
        mesh.yaml."""
        while True:
            self._changed.clear()
            if self._wanted:
                await self._mesh.wait_first_report(FIRST_REPORT_TIMEOUT_S)
            while next_load := find_next_load(self._wanted, [self._describe_node(node) for node in self._mesh.fleet]):
                await self._load(next_load)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._changed.wait()

    def _describe_node(self, node: Node) -> PlacementNode:
        """The node as ``find_next_load`` sees it now."""
        account, now = node.account, self._clock()
        residency = account.residency
        is_idle = (
            account.is_usable(now)
            and account.kind in KINDS_WITH_MODEL_STORE
            and account.count() == 0
            and account.foreign_load <= FOREIGN_LOAD
            and residency.next_load_starts_at(now) <= now
        )
        if account.is_up:
            self._away_since.pop(node.name, None)
        # A node that has just gone away may soon be back, with its copies. Later they count as lost.
        is_gone = not account.is_up and now - self._away_since.setdefault(node.name, now) >= AWAY_S
        loaded: frozenset[str] = frozenset() if is_gone else frozenset(residency.loaded)
        wanted = [full_name(spec.name) for spec in self._wanted]
        return PlacementNode(
            node.name,
            is_idle,
            models=account.models or frozenset(),
            loaded=loaded,
            # ``used_at`` is 0 for a model that other programs have loaded: it is not known when they used it.
            used={name for name, model in residency.loaded.items() if 0.0 < model.used_at > now - RECENT_USE_S},
            pushed_out={name: residency.pushed_out_by(ResidencyKey(name), {}) for name in wanted if name not in loaded},
            failed={
                name
                for name in wanted
                if account.is_broken_for(name, now) or self._failed_until.get((node.name, name), now) > now
            },
            tier=account.tier,
        )

    async def _load(self, next_load: NextLoad) -> None:
        """Loads one model, and returns when it is in memory or the load has failed."""
        node = self._mesh.fleet[next_load.node]
        name_at_server = node.server_name(next_load.model) or next_load.model
        is_embedder = is_embedder_on(node.state(queued=0), name_at_server)
        context = None if is_embedder else next_load.context  # requests to an embedding model ask for no context
        key = ResidencyKey(full_name(next_load.model), context)
        pushed_out = f", in place of {', '.join(next_load.pushed_out)}" if next_load.pushed_out else ""
        log.info(
            "loading %s%s: mesh.yaml wants %d in memory, there are %d",
            next_load.model,
            pushed_out,
            next_load.wanted,
            next_load.present,
            extra={"event": "placement", "node": next_load.node},
        )
        store = ModelStore(next_load.node, over_mesh(self._mesh, next_load.node))
        node.note_load_sent(key)
        is_loaded = False
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                await store.load(name_at_server, embedder=is_embedder, keep_alive=KEEP_ALIVE, context=context)
            is_loaded = True
        except (GPUMeshError, TimeoutError) as error:  # the mesh works without this copy, so it goes on
            reason = "it took too long" if isinstance(error, TimeoutError) else str(error)
            log.warning(
                "could not load %s: %s", next_load.model, reason, extra={"event": "placement", "node": next_load.node}
            )
            self._failed_until[next_load.node, key.model] = self._clock() + RETRY_S
        finally:
            node.note_load_ended(key, is_loaded=is_loaded)
