"""What all scenarios have in common: what a scenario knows, and how it asks for the stages that it needs.

A scenario is a generator. It yields a ``Stage``; the caller runs it and sends back a ``StageOutcome``, from which the
scenario decides which stage comes next. So a scenario decides without I/O, and a test can play the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gpumesh.bench.figures.capacity import NodeCapacity
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.workload.prompts import OwnPrompt, PromptFactory
from gpumesh.bench.workload.settings import BenchSettings
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind
from gpumesh.bench.workload.traces import TracedRequest


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node that a scenario may use, as it is at one moment.

    ``parallel``: how many requests it runs at once, as far as the mesh knows. ``loaded``: the models in its memory.
    ``routes``: the names of the routes to it that ``overhead`` compares.
    """

    name: str
    parallel: int | None = None
    loaded: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What came of a stage: its figures (one result, or one for each route; none for a warm-up), its duration, and the
    nodes before it and after it."""

    results: tuple[StageResult, ...]
    before: tuple[NodeFacts, ...] = ()
    after: tuple[NodeFacts, ...] = ()
    duration_s: float = 0.0

    @property
    def result(self) -> StageResult:
        """The only result. Raises ``ValueError`` if the stage used several routes, or was a warm-up."""
        (result,) = self.results
        return result


@dataclass(slots=True)
class ScenarioContext:
    """What a scenario decides by. ``nodes`` are those that can serve the model, as they were at the start.

    ``trace`` is for ``replay`` only, ``own_prompts`` (those of a file of the user) for ``load``. ``notes`` are
    sentences for the person who reads the result; a scenario may add some. ``has_mesh``: the requests go through the
    mesh, which may keep some of them in its queue. ``capacities`` are those of the nodes, once a scenario has found
    them.
    """

    settings: BenchSettings
    nodes: tuple[NodeFacts, ...]
    prompts: PromptFactory
    trace: Sequence[TracedRequest] = ()
    own_prompts: Sequence[OwnPrompt] = ()
    notes: list[str] = field(default_factory=list)
    has_mesh: bool = True
    capacities: list[NodeCapacity] = field(default_factory=list)


ScenarioSteps: TypeAlias = Generator[Stage, StageOutcome, None]


def make_stage(
    name: str,
    kind: StageKind,
    requests: Iterable[PlannedRequest],
    concurrency: int | None,
    *,
    node: str | None = None,
    disturb: bool = False,
    over_routes: bool = False,
    duration_s: float | None = None,
    think_s: float = 0.0,
    direct: bool = False,
) -> Stage:
    """Makes a stage of these requests. Without ``concurrency``, it is an open loop. The rest is as in ``Stage``."""
    return Stage(
        name,
        kind,
        tuple(requests),
        node=node,
        concurrency=concurrency,
        disturb=disturb,
        over_routes=over_routes,
        duration_s=duration_s,
        think_s=think_s,
        direct=direct,
    )


def find_limit(nodes: Iterable[NodeFacts], name: str) -> int | None:
    """The mesh's limit of this node: how many requests it sends there at once. ``None`` if it is not known."""
    return next((facts.parallel for facts in nodes if facts.name == name), None)


def whole_rounds(count: int, level: int) -> int:
    """The number of requests, rounded up to a multiple of ``level``: then no round has fewer in flight than others."""
    return math.ceil(count / level) * level


def make_node_stage(prompts: PromptFactory, node: str, count: int, concurrency: int) -> Stage:
    """A stage of ``count`` requests to one node, ``concurrency`` at a time."""
    requests = [PlannedRequest(prompts.make_prompt(), node) for _ in range(count)]
    return make_stage(node, StageKind.NODE, requests, concurrency, node=node)


def make_mesh_stage(name: str, prompts: PromptFactory, count: int, concurrency: int, *, disturb: bool = False) -> Stage:
    """A stage of ``count`` requests to the mesh, ``concurrency`` at a time. ``disturb``: see ``Stage``."""
    requests = [PlannedRequest(prompts.make_prompt()) for _ in range(count)]
    return make_stage(name, StageKind.MESH, requests, concurrency, disturb=disturb)
