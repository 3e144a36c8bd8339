"""Plays the mesh for a scenario, in computed time: nodes with slots, and the limit that the mesh has for each node."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.samples import ClientLoad, LoadSample, SampleOutcome, StageRun
from gpumesh.bench.scenarios.base import NodeFacts, ScenarioContext, StageOutcome
from gpumesh.bench.scenarios.catalog import scenario_steps
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.prompts import PromptFactory
from gpumesh.bench.workload.settings import BenchSettings, Scenario
from gpumesh.bench.workload.stages import Stage, StageKind

READ_S = 0.05  # until the first token


@dataclass
class PlayedNode:
    """``slots`` run at once, each with ``rate`` tokens/s; all together give at most ``most`` tokens/s. The mesh keeps
    what is beyond ``limit`` in its queue. ``is_broken``: every request fails. ``counts``: its server counts tokens."""

    slots: int
    rate: float = 50.0
    most: float = math.inf
    limit: int | None = None
    is_broken: bool = False
    counts: bool = True
    loaded: tuple[str, ...] = ("m:latest",)
    at_once: int = 1  # what the mesh has seen so far

    def facts(self, name: str) -> NodeFacts:
        return NodeFacts(name, self.at_once if self.limit is None else self.limit, self.loaded)


@dataclass
class PlayedMesh:
    """``before_stage`` is called with each stage before it runs: a test may change the nodes there, as life does."""

    nodes: Mapping[str, PlayedNode]
    changes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    results: list[StageResult] = field(default_factory=list)

    def run(self, stage: Stage) -> StageOutcome:
        before = tuple(node.facts(name) for name, node in self.nodes.items())
        records = self._records(stage)
        self.stages.append(stage)
        tries = [one for one in self.stages if one.name == stage.name]
        changes = self.changes.get(stage.name, ())
        if len(tries) <= len(changes):
            changes[len(tries) - 1](self.nodes)
        after = tuple(node.facts(name) for name, node in self.nodes.items())
        duration_s = max(record.ended_s for record in records)
        results = summarize_stage(StageRun(stage, tuple(records), duration_s, ClientLoad(0.1, 0.1)), Objective())
        self.results.extend(results)
        return StageOutcome(() if stage.kind is StageKind.WARM_UP else tuple(results), before, after, duration_s)

    def _records(self, stage: Stage) -> list[LoadSample]:
        """The requests of a closed loop. A slot is a number: when it becomes free."""
        level = stage.concurrency
        assert level is not None
        workers = [0.0] * level
        slots = {name: [0.0] * node.slots for name, node in self.nodes.items()}
        places = {
            name: [0.0] * (node.slots * 8 if node.limit is None or stage.direct else node.limit)
            for name, node in self.nodes.items()
        }
        records: list[LoadSample] = []
        for index, planned in enumerate(stage.requests):
            sent_s = heapq.heappop(workers)
            name = planned.node or min(slots, key=lambda name: max(min(slots[name]), min(places[name])))
            node = self.nodes[name]
            arrived_s = max(sent_s, heapq.heappop(places[name]))
            began_s = max(arrived_s, heapq.heappop(slots[name]))
            tokens = int(str(planned.chat.options["num_predict"]))
            streams = min(level, node.slots, node.limit or level)
            gap_s = max(1.0 / node.rate, streams / node.most)
            first_s = began_s + READ_S
            ended_s = first_s + gap_s * tokens
            if node.is_broken:
                ended_s = began_s + 0.01
            for queue in (workers, slots[name], places[name]):
                heapq.heappush(queue, ended_s)
            arrivals = () if node.is_broken else tuple(first_s + gap_s * number for number in range(tokens))
            counters = ServerCounters(
                5, tokens, (ended_s - arrived_s) * 1e3, 0.0, READ_S * 1e3, (ended_s - first_s) * 1e3
            )
            records.append(
                LoadSample(
                    stage.name,
                    index,
                    SampleOutcome.FAILED if node.is_broken else SampleOutcome.SERVED,
                    sent_s,
                    sent_s,
                    ended_s,
                    name,
                    0 if node.is_broken else 1,
                    arrivals_s=arrivals,
                    tokens=tokens if node.counts and not node.is_broken else None,
                    counters=counters if node.counts and not node.is_broken else None,
                    error_code="backend-unreachable" if node.is_broken else None,
                )
            )
            node.at_once = max(node.at_once, streams)
        return records


def play(
    mesh: PlayedMesh, scenario: Scenario, settings: BenchSettings | None = None, *, known: bool = False
) -> ScenarioContext:
    """Runs a scenario to its end. ``known``: the mesh knows its limits from the start."""
    settings = settings or BenchSettings("m")
    facts = tuple(node.facts(name) if known else NodeFacts(name) for name, node in mesh.nodes.items())
    context = ScenarioContext(settings, facts, PromptFactory(settings, Random(7)))
    steps = scenario_steps(scenario, context)
    stage = next(steps)
    while True:
        try:
            stage = steps.send(mesh.run(stage))
        except StopIteration:
            return context
