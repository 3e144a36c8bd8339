"""The answer of a benchmark in plain sentences, for the report and the terminal. Pure.

A sentence is there only if the figures that it needs are known. Names come from hosts and files: the code that shows a
sentence makes its text printable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.scaling import Scaling
from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.report.answers.cost_answer import cost_sentence
from gpumesh.bench.report.answers.scenario_answers import clients_sentence, failover_sentence, route_sentences
from gpumesh.bench.report.answers.slowest_node import slowest_node_sentence
from gpumesh.bench.report.svg import format_number
from gpumesh.bench.results.result import BenchResult
from gpumesh.bench.workload.settings import Scenario
from gpumesh.bench.workload.stages import StageKind

# A load counts as served within the objectives if at least this share of its requests met them.
GOOD_SHARE = 0.95
CLEAR_LOSS = 0.02  # of a rate: a smaller loss is within the noise of two rates
MAX_NODES = 6  # that are named in one sentence


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A sentence or two about one topic (``Capacity``, ``Cost``), which is the part's title."""

    topic: str
    text: str


def answer_parts(result: BenchResult) -> list[AnswerPart]:
    """The whole answer, the most important part first."""
    topics = (
        ("Result", _special_sentence(result)),
        ("Capacity", _capacity_sentence(result)),
        ("Knee", _knee_sentence(result)),
        ("Slowest node", slowest_node_sentence(result)),
        ("Scaling", _scaling_sentence(result)),
        ("Users", _users_sentence(result)),
        ("Failures", _failures_sentence(result)),
        ("Caution", _caution_sentence(result)),
        ("Cost", cost_sentence(result, _mesh_stages(result))),
    )
    return [AnswerPart(topic, text) for topic, text in topics if text]


def short_answer(result: BenchResult) -> list[str]:
    """The two or three sentences that a terminal shows below its table, which has lines for the rest."""
    sentences = [_mesh_rate(result), _users_sentence(result)]
    if result.scenario is Scenario.FAILOVER:
        sentences = [clients_sentence(result)]
    if result.costs:
        sentences.append(cost_sentence(result, _mesh_stages(result)))
    return [sentence for sentence in sentences if sentence]


def partial_sentence(result: BenchResult) -> str | None:
    """Says that a result is partial, why, and how far its last stage came; ``None`` for a whole result."""
    if not result.partial:
        return None
    reason = result.partial_reason or "the run still goes on, or it was killed"
    unfinished = [stage for stage in result.stages if stage.partial]
    if not result.stages:
        return f"Partial result: {reason}. Nothing was measured."
    if not unfinished and result.runs:
        return f"Partial result: {reason}. The figures are those of {len(result.runs)} whole runs."
    if not unfinished:
        return f"Partial result: {reason}. Each stage that is shown is whole."
    stage = unfinished[0]  # several only if it has routes
    ended = sum(part.requests - part.unfinished for part in unfinished)
    of_planned = "" if stage.planned is None else f" of {stage.planned}"
    return f"Partial result: {reason}. In stage {stage.name}, {ended}{of_planned} requests had ended."


def _special_sentence(result: BenchResult) -> str:
    """The answer of a scenario that does not ask how much the mesh can do: ``overhead``, ``failover``."""
    if result.scenario is Scenario.OVERHEAD:
        return " ".join(route_sentences(result))
    if result.scenario is Scenario.FAILOVER:
        return failover_sentence(result)
    return ""


def _mesh_stages(result: BenchResult) -> list[StageResult]:
    """The stages that measure the mesh as a whole, undisturbed."""
    kinds = (StageKind.MESH, StageKind.TRACE)
    return [stage for stage in result.stages if stage.kind in kinds and not stage.disturbance]


def _best_stage(result: BenchResult) -> StageResult | None:
    """The stage of the mesh with the highest rate; ``None`` if no rate is known.

    In a sweep it is that of the knee: past it, higher rates are noise.
    """
    stages = [stage for stage in _mesh_stages(result) if stage.rates.best_tokens_per_s]
    if result.knee is not None:
        stages = [stage for stage in stages if stage.concurrency == result.knee.level]
    return max(stages, key=_rate_or_zero, default=None)


def _rate_or_zero(stage: StageResult) -> float:
    return stage.rates.best_tokens_per_s or 0.0


def _capacity_sentence(result: BenchResult) -> str:
    """How many tokens/s the mesh gives, and each node alone."""
    mesh = _mesh_rate(result)
    is_single = sum(node.measured for node in result.environment.nodes) == 1
    alone = "" if (mesh and is_single) or result.scenario is Scenario.OVERHEAD else _nodes_alone(result)
    return " ".join(sentence for sentence in (mesh, alone) if sentence)


def _mesh_rate(result: BenchResult) -> str:
    """How many tokens/s the mesh gives at most; empty if that was not measured."""
    best = _best_stage(result)
    if best is None:
        return ""
    names = [node.name for node in result.environment.nodes if node.measured]
    subject = f"The mesh of {len(names)} nodes" if len(names) != 1 else names[0]
    rate_text = f"{format_number(best.rates.best_tokens_per_s)} output tokens/s"
    if best.concurrency is not None:
        return f"{subject} gives {rate_text} with {_requests(best.concurrency)} in flight."
    requests_per_s = format_number(best.rates.best_requests_per_s)
    served = f"{subject} served {best.served:,} of {best.requests:,} requests"
    return f"{served}: {requests_per_s} requests/s and {rate_text}."


def _nodes_alone(result: BenchResult) -> str:
    """What each node gives alone: at its capacity if that was found, else in its own stage."""
    if result.capacity:
        texts = [
            f"{node.node} gives {format_number(node.tokens_per_s)} tokens/s with {_requests(node.parallel)} at once"
            f" ({node.reason})"
            for node in result.capacity
        ]
    else:
        texts = [
            f"{stage.node} gives {format_number(stage.rates.best_tokens_per_s)} tokens/s with"
            f" {_requests(stage.concurrency or 0)} in flight"
            for stage in result.stages
            if stage.kind is StageKind.NODE and stage.route is None and stage.rates.best_tokens_per_s
        ]
    if len(texts) > MAX_NODES:
        texts[MAX_NODES:] = [f"{len(texts) - MAX_NODES} more nodes are in the tables"]
    return f"Alone, {'. '.join(texts)}." if texts else ""


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _knee_sentence(result: BenchResult) -> str:
    """The load above which more requests bring no more tokens/s, and the goodput at this load."""
    return "" if result.knee is None else f"{result.knee.text}. At the knee: {result.knee.goodput_text}."


def _scaling_sentence(result: BenchResult) -> str:
    """The mesh's rate as a share of the sum of its nodes alone, and why it is not the whole sum."""
    scaling = result.scaling
    if scaling is None:
        return ""
    rates = f"{format_number(scaling.mesh_tokens_per_s)} of {format_number(scaling.sum_tokens_per_s)} tokens/s"
    sentences = [f"The mesh gives {scaling.efficiency:.0%} of what its nodes give alone ({rates})"]
    if scaling.explanation is not None:
        sentences[0] += f": {scaling.explanation}"
    lost = _lost_parts(scaling)
    if lost:
        sentences.append(f"Lost, in tokens/s: {', '.join(lost)}")
    if scaling.tail_share is not None and scaling.tail_share >= CLEAR_LOSS:
        tail = f"A batch of just these requests loses {scaling.tail_share:.0%} more by its ramp and its tail"
        sentences.append(f"{tail}, while not all slots are busy")
    return " ".join(f"{sentence}." for sentence in sentences)


def _lost_parts(scaling: Scaling) -> list[str]:
    """The parts of the loss (see ``NodeLoss``) that are more than noise, each summed over all nodes. Largest first."""
    parts = (
        (math.fsum(loss.starved_tokens_per_s for loss in scaling.losses), "by slots that had no request"),
        (math.fsum(loss.slowed_tokens_per_s for loss in scaling.losses), "because each answer was slower than alone"),
        (math.fsum(loss.swapped_tokens_per_s for loss in scaling.losses), "by loads of the model"),
    )
    noise = CLEAR_LOSS * scaling.sum_tokens_per_s
    return [f"{format_number(amount)} {reason}" for amount, reason in sorted(parts, reverse=True) if amount >= noise]


def _users_sentence(result: BenchResult) -> str:
    """How many users at a time are served within the objectives. A user has one request in flight at every moment."""
    stages = [stage for stage in _mesh_stages(result) if stage.rates.good_share is not None]
    if result.scenario is Scenario.OVERHEAD or not stages:
        return ""
    within = f"TTFT ≤ {format_number_short(result.objective.ttft_ms)} ms and TPOT ≤ "
    within += f"{format_number_short(result.objective.tpot_ms)} ms"
    closed = sorted((stage for stage in stages if stage.concurrency), key=lambda stage: stage.concurrency or 0)
    if not closed:
        (stage, *_) = stages
        goodput = format_number(stage.rates.best_goodput_per_s)
        return f"With this load, {_good_share(stage)} of the requests met {within}: {goodput} good requests/s."
    served = list(itertools.takewhile(lambda stage: (stage.rates.good_share or 0.0) >= GOOD_SHARE, closed))
    beyond = closed[len(served) :]
    if not served:
        first = beyond[0]
        return f"No measured load was served within {within}: {_good_share(first)} of the requests of {_users(first)}."
    most = served[-1]
    sentence = f"{_users(most)} at a time: {_good_share(most)} of the requests met {within}"
    if beyond:
        return f"{sentence}; with {beyond[0].concurrency}, only {_good_share(beyond[0])}."
    return f"{sentence}; more were not measured."


def _users(stage: StageResult) -> str:
    return "1 user" if stage.concurrency == 1 else f"{stage.concurrency} users"


def _good_share(stage: StageResult) -> str:
    """The share of the requests that met the objectives. Rounded down: 99.9% are not all."""
    share = stage.rates.good_share or 0.0
    return f"{int(share * 100)}%" if share < 1 else "all"


def format_number_short(value: float) -> str:
    """A number that a person has chosen, without needless zeros: 2,000 and 0.5."""
    return f"{value:,.10g}"


def _caution_sentence(result: BenchResult) -> str:
    """Which stages may tell of the measuring machine or of the mesh's process instead of the servers."""
    stages: dict[str, list[str]] = {}  # the names of the stages, by what limited them
    for stage in result.stages:
        if stage.conditions is not None and stage.conditions.limit is not None:
            stages.setdefault(stage.conditions.limit.value.upper(), []).append(stage_label(stage))
    if not stages:
        return ""
    limits = "; ".join(f"{limit} in {_list_names(names)}" for limit, names in stages.items())
    return f"{limits}: these figures may not be those of the servers. The notes say why."


def _list_names(names: Sequence[str]) -> str:
    """The names, of many only the first ones."""
    shown = [*names[:MAX_NODES], *([f"{len(names) - MAX_NODES} more"] if len(names) > MAX_NODES else [])]
    return ", ".join(shown)


def _failures_sentence(result: BenchResult) -> str:
    """How many requests failed, and the most frequent reason; empty if none failed."""
    failed = result.failed
    if not failed:
        return ""
    total = sum(stage.requests - stage.unfinished for stage in result.stages)
    failures = [failure for stage in result.stages for failure in stage.failures]
    reason = ""
    if failures:
        most = max(failures, key=lambda failure: failure.count)
        reason = f" Most often: {most.message or most.code}."
    return f"{failed:,} of {total:,} requests failed.{reason}"
