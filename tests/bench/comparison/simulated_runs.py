"""Made-up results of benchmarks, as realistic as the statistics of `bench compare` need them. The seed decides all.

A closed loop on nodes with slots. What makes runs differ, as it does on real hosts:

- each node's speed changes from run to run (clock, temperature), and slowly within a run,
- each node's time for a prompt changes from run to run more than its speed,
- each answer has its own noise, some have a stall, some are shorter than asked.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.comparison.compare import Comparison, Difference, DifferenceVerdict
from gpumesh.bench.figures.gpu_meter import GpuUse
from gpumesh.bench.figures.summary import StageResult, summarize_stage
from gpumesh.bench.load.samples import LoadSample, SampleOutcome
from gpumesh.bench.results.joint import join_runs
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.stats import Objective
from gpumesh.bench.workload.stages import StageKind
from tests.bench.example_results import make_stage_run, result, stage

# The figures that slower decoding changes.
DECODE_FIGURES = frozenset({"tpot p50", "end-to-end p50", "end-to-end p90", "server tokens/s p50", "tokens/s"})
OBJECTIVE = Objective(ttft_ms=180.0, tpot_ms=200.0)  # some answers do not meet it


@dataclass(frozen=True)
class Noise:
    """Standard deviations as shares; the shares of answers that stall or are short, and of runs with a pause."""

    speed_between_runs: float = 0.008
    prompt_between_runs: float = 0.02
    speed_within_run: float = 0.005
    prompt_of_request: float = 0.08
    speed_of_request: float = 0.01
    stalls: float = 0.02
    short_answers: float = 0.05
    bad_runs: float = 0.0


@dataclass(frozen=True)
class Node:
    name: str
    tokens_per_s: float
    slots: int
    prompt_ms: float = 120.0


# Slow, so that short answers, which are quick to make, take as long as real ones.
NODES = (Node("alpha", 25.0, 4), Node("beta", 15.0, 1))


def make_result(
    rng: random.Random,
    *,
    repeat: int = 1,
    slower: float = 1.0,
    count: int = 40,
    tokens: int = 16,
    noise: Noise | None = None,
    nodes: Sequence[Node] = NODES,
) -> BenchResult:
    """A result of ``repeat`` runs. ``slower``: each token takes so many times as long. ``count``: requests per node."""
    runs = [_make_run(rng, slower, count, tokens, noise or Noise(), nodes) for _ in range(repeat)]
    return runs[0] if repeat == 1 else join_runs(runs)


def _make_run(
    rng: random.Random, slower: float, count: int, tokens: int, noise: Noise, nodes: Sequence[Node]
) -> BenchResult:
    """One run as ``scale`` makes it: each node alone with all its slots, then all nodes together."""
    drifted = [
        replace(
            node,
            tokens_per_s=node.tokens_per_s / slower * _around_one(rng, noise.speed_between_runs),
            prompt_ms=node.prompt_ms * _around_one(rng, noise.prompt_between_runs),
        )
        for node in nodes
    ]
    pause_s = rng.uniform(0.2, 1.0) if rng.random() < noise.bad_runs else 0.0
    stages: list[StageResult] = []
    for node in drifted:
        stages.append(_make_stage(rng, node.name, StageKind.NODE, [node], count, tokens, noise, pause_s))
    stages.append(_make_stage(rng, "mesh", StageKind.MESH, drifted, count * len(nodes), tokens, noise, pause_s))
    return result(*stages, objective=OBJECTIVE)


def _around_one(rng: random.Random, deviation: float) -> float:
    return math.exp(rng.gauss(0.0, deviation))


def _make_stage(
    rng: random.Random,
    name: str,
    kind: StageKind,
    nodes: Sequence[Node],
    count: int,
    tokens: int,
    noise: Noise,
    pause_s: float,
) -> StageResult:
    """A closed loop with a request in each slot. In the middle, all slots pause for ``pause_s``."""
    slots = [(0.0, index, node) for index, node in enumerate(node for node in nodes for _ in range(node.slots))]
    speed_drift = 1.0
    records = []
    for index in range(count):
        if index == count // 2:
            slots = [(free_s + pause_s, slot, node) for free_s, slot, node in slots]
        start_s, slot, node = heapq.heappop(slots)
        # A slow change: it keeps nine tenths of what it was at the answer before.
        speed_drift = math.exp(0.9 * math.log(speed_drift) + rng.gauss(0.0, noise.speed_within_run * 0.44))
        record = _make_record(rng, index, start_s, node, speed_drift, tokens, noise)
        records.append(record)
        heapq.heappush(slots, (record.ended_s, slot, node))
    of = stage(name, kind=kind, count=count, concurrency=len(slots), node=name if kind is StageKind.NODE else None)
    run = make_stage_run(*records, of=of)
    power_w = 300.0 * len(nodes) * _around_one(rng, 0.005)
    gpu = GpuUse(len(nodes), 20, 90.0, power_w, power_w * run.duration_s, 8000)
    (made,) = summarize_stage(run, OBJECTIVE, gpu)
    return made


def _make_record(
    rng: random.Random, index: int, start_s: float, node: Node, speed_drift: float, tokens: int, noise: Noise
) -> LoadSample:
    """An answer with counters as Ollama gives them."""
    if rng.random() < noise.short_answers:
        tokens = rng.randint(tokens // 2, tokens)
    prompt_s = node.prompt_ms / 1000.0 * _around_one(rng, noise.prompt_of_request)
    speed = node.tokens_per_s * speed_drift * _around_one(rng, noise.speed_of_request)
    stall_s = rng.uniform(0.02, 0.2) if rng.random() < noise.stalls else 0.0
    stall_at = rng.randrange(tokens)
    times_s = [prompt_s + number / speed + (stall_s if number >= stall_at else 0.0) for number in range(1, tokens + 1)]
    arrivals = tuple(start_s + time_s + rng.expovariate(1 / 0.0003) for time_s in times_s)
    total_ms = times_s[-1] * 1000.0
    return LoadSample(
        stage="mesh",
        index=index,
        outcome=SampleOutcome.SERVED,
        intended_s=start_s,
        sent_s=start_s,
        ended_s=max(arrivals) + 0.0005,
        node=node.name,
        attempts=1,
        arrivals_s=tuple(sorted(arrivals)),
        tokens=tokens,
        prompt_tokens=40,
        counters=ServerCounters(
            prompt_tokens=40, tokens=tokens, total_ms=total_ms, load_ms=0.0, eval_ms=total_ms - prompt_s * 1000.0
        ),
        done_reason="length",
    )


def false_verdicts(comparison: Comparison) -> list[Difference]:
    """The verdicts of a comparison of two results of the same thing: each is false."""
    return [one for one in comparison.differences if one.verdict in (DifferenceVerdict.BETTER, DifferenceVerdict.WORSE)]


def missed_decode_figures(comparison: Comparison) -> Iterator[Difference]:
    """The figures that slower decoding must have made worse, and that have another verdict."""
    for difference in comparison.differences:
        if difference.figure in DECODE_FIGURES and difference.verdict is not DifferenceVerdict.WORSE:
            yield difference
