"""Finds the capacity of each node before anything is compared: how many requests at once give its most tokens/s.

Each node gets a ramp: 1, 2, 4, … requests in flight, in short stages, until its tokens/s stop growing or the node runs
fewer at once than were sent. The ramp begins at the number that the mesh knows, if it knows one.

The requests go through the mesh, so the ramp teaches the mesh too: its own limit of a node doubles with each level
(``balancer/limits``), and is known for sure when a request has waited inside the server. But the mesh keeps what is
beyond its limit in its own queue, where no server sees it. So if a level does not fill and nothing waited inside the
server, the same level is sent to the server directly.
"""

from __future__ import annotations

from collections.abc import Generator

from gpumesh.bench.figures.capacity import NodeCapacity, RampPoint, find_full_point, ramp_point
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.scenarios.base import (
    NodeFacts,
    ScenarioContext,
    ScenarioSteps,
    StageOutcome,
    find_limit,
    make_stage,
)
from gpumesh.bench.workload.stages import PlannedRequest, Stage, StageKind

ROUNDS = 3  # of each level: the second one is that in which all slots are busy and not in step
MIN_GROWTH = 0.05  # a level that gives less than this more than the level before gives no more
MAX_LEVEL = 512
RAMP_S = 60.0  # no further level is begun if a node's ramp would take longer with it
# An answer of a ramp takes about a second: long enough that answers which run at once are seen together.
ANSWER_S, FIRST_TOKENS, MIN_TOKENS, MAX_TOKENS = 1.0, 32, 16, 128
MAX_SETTLE_STAGES = 2  # of the last level, if the mesh's limit still changes


def find_capacities(context: ScenarioContext) -> ScenarioSteps:
    """Finds the capacity of each node, one node after the other, and keeps it in ``context.capacities``."""
    for node in context.nodes:
        capacity = yield from _find_capacity(context, node)
        context.capacities.append(capacity)


def _find_capacity(context: ScenarioContext, node: NodeFacts) -> Generator[Stage, StageOutcome, NodeCapacity]:
    """The ramp of one node."""
    points: list[RampPoint] = []
    level, tokens, spent_s = node.parallel or 1, FIRST_TOKENS, 0.0
    while True:
        outcome = yield _ramp_stage(context, node.name, level, tokens)
        result = outcome.results[0] if outcome.results else None
        if result is None or not result.served:
            reason = "no request of its ramp was served"
            return NodeCapacity(node.name, node.parallel or 1, None, reason, tuple(points))
        point = ramp_point(result, level)
        points.append(point)
        spent_s += result.duration_s
        tokens = _answer_tokens(result, tokens)
        if 0 < point.at_once < level:  # 0: answers of a single piece do not show it
            return (yield from _confirm_slots(context, node.name, points, tokens, outcome))
        if len(points) > 1 and not _has_grown(points[-2], point):
            full = find_full_point(points)
            reason = f"{level} at once give no more"
            return NodeCapacity(node.name, full.running, full.tokens_per_s, reason, tuple(points))
        # The next level has twice as many requests. They take as long as these, or twice as long if no slot is left.
        if spent_s + 2 * result.duration_s > RAMP_S or level >= MAX_LEVEL:
            reason = "its ramp ended there, so that it does not take too long; more may give more"
            context.notes.append(f"capacity of {node.name}: {level} at once: {reason}")
            return NodeCapacity(node.name, level, point.tokens_per_s, reason, tuple(points))
        level *= 2


def _confirm_slots(
    context: ScenarioContext, node: str, points: list[RampPoint], tokens: int, outcome: StageOutcome
) -> Generator[Stage, StageOutcome, NodeCapacity]:
    """The end of a ramp whose last level did not fill: fewer answers came at once than requests were in flight.

    Repeats the level while the mesh's limit still changes. Then finds out what holds the others back: the server,
    inside which they waited, or the mesh, which kept them in its queue.
    """
    level = points[-1].level
    for _ in range(MAX_SETTLE_STAGES):
        if find_limit(outcome.before, node) == find_limit(outcome.after, node):
            break
        outcome = yield _ramp_stage(context, node, level, tokens)
        if not outcome.results or not outcome.results[0].served:
            break
        points.append(ramp_point(outcome.results[0], level))
    full = find_full_point(points)
    last = points[-1]
    server_parallel = None
    reason = "these are all slots of its server"
    if context.has_mesh and not last.waited_inside and last.at_once < level:
        outcome = yield _ramp_stage(context, node, level, tokens, is_direct=True)
        if outcome.results and outcome.results[0].served:
            direct = ramp_point(outcome.results[0], level, is_direct=True)
            points.append(direct)
            if direct.at_once > last.at_once:
                server_parallel = direct.at_once
                more = "or more " if direct.at_once == level else ""
                reason = f"the mesh gives it {last.running} at a time; its server runs {server_parallel} {more}at once"
                context.notes.append(
                    f"{node}: {reason}: max_parallel in mesh.yaml, or what the mesh has learned, leaves slots unused"
                )
    return NodeCapacity(node, full.running, full.tokens_per_s, reason, tuple(points), server_parallel)


def _ramp_stage(context: ScenarioContext, node: str, level: int, tokens: int, *, is_direct: bool = False) -> Stage:
    """A short stage of ``level`` requests in flight on one node, with answers of ``tokens`` tokens."""
    rounds = 1 if is_direct else ROUNDS  # a direct stage only shows how many answers come at once
    requests = [PlannedRequest(context.prompts.make_prompt(tokens=tokens), node) for _ in range(rounds * level)]
    name = f"capacity of {node}: {level} in flight" + (", without the mesh" if is_direct else "")
    return make_stage(name, StageKind.CAPACITY, requests, level, node=node, direct=is_direct)


def _answer_tokens(result: StageResult, tokens: int) -> int:
    """The tokens of an answer that takes about ``ANSWER_S``; as many as before if the rate of an answer is unknown."""
    each_tokens_per_s = result.rates.server.mean or result.rates.wall.mean
    if each_tokens_per_s is None:
        return tokens
    return min(max(round(each_tokens_per_s * ANSWER_S), MIN_TOKENS), MAX_TOKENS)


def _has_grown(earlier: RampPoint, later: RampPoint) -> bool:
    """Whether the later level gave more tokens/s. An unknown rate has not grown."""
    if earlier.tokens_per_s is None or later.tokens_per_s is None:
        return False
    return later.tokens_per_s >= earlier.tokens_per_s * (1.0 + MIN_GROWTH)
