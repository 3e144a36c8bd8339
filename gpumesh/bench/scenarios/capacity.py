"""Finds the capacity of each node before anything is compared: how many requests at once give its most tokens/s.

Each node gets a ramp: 1, 2, 4, … requests in flight, in short stages, until its tokens/s stop growing or the node runs
fewer at once than were sent. The ramp begins at the number that the mesh knows, if it knows one.

The requests go through the mesh, so the ramp teaches the mesh too: its own limit of a node doubles with each level
(``balancer/limits``), and is known for sure when a request has waited inside the server. But the mesh keeps what is
beyond its limit in its own queue, where no server sees it. So if a level does not fill and nothing waited inside the
server, the same level is sent to the server directly.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from gpumesh.bench.figures.capacity import NodeCapacity, RampPoint, find_full_point, ramp_point, ramp_rates
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

ROUNDS = 3  # requests for each slot of a level; in the second round, all slots are busy and not in step
MIN_GROWTH = 0.05  # a smaller growth of the tokens/s from one level to the next counts as none
MAX_LEVEL = 512
RAMP_S = 60.0  # no further level is begun if a node's ramp would take longer with it
# An answer of a ramp takes about a second: long enough that answers which run at once are seen together.
ANSWER_S, FIRST_TOKENS, MIN_TOKENS, MAX_TOKENS = 1.0, 32, 16, 128
MAX_REPEATS = 2  # how often a level is sent again


def find_capacities(context: ScenarioContext) -> ScenarioSteps:
    """Finds the capacity of each node, one node after the other, and keeps it in ``context.capacities``."""
    for node in context.nodes:
        capacity = yield from _find_capacity(context, node)
        context.capacities.append(capacity)


def _find_capacity(context: ScenarioContext, node: NodeFacts) -> Generator[Stage, StageOutcome, NodeCapacity]:
    """Yields the stages of the node's ramp, and returns the capacity that they show.

    The ramp ends when the node runs fewer requests at once than were sent, when more requests give no more tokens/s, or
    when a further level would take too long.
    """
    points: list[RampPoint] = []
    level, tokens, spent_s = node.parallel or 1, FIRST_TOKENS, 0.0
    repeats = 0  # of this level
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
        if 0 < point.at_once < level:  # 0: unknown, because the answers came as single pieces
            limit_before, limit_after = (find_limit(nodes, node.name) for nodes in (outcome.before, outcome.after))
            if limit_before == limit_after or repeats == MAX_REPEATS:
                return (yield from _confirm_slots(context, node.name, points, tokens, limit_after))
            repeats += 1  # the mesh's limit changed during the stage: with the new one, the level may fill
            continue
        if _has_stopped_growing(points):
            if not repeats:  # a short disturbance also lowers the tokens/s, so one stage is not enough
                repeats += 1
                continue
            full = find_full_point(points)
            reason = f"{level} at once give no more"
            return NodeCapacity(node.name, full.running, full.tokens_per_s, reason, tuple(points))
        # The next level has twice as many requests. They take as long as these, or twice as long if no slot is left.
        if spent_s + 2 * result.duration_s > RAMP_S or level >= MAX_LEVEL:
            reason = "its ramp ended there, so that it does not take too long; more may give more"
            context.notes.append(f"capacity of {node.name}: {level} at once: {reason}")
            return NodeCapacity(node.name, level, point.tokens_per_s, reason, tuple(points))
        level, repeats = 2 * level, 0


def _confirm_slots(
    context: ScenarioContext, node: str, points: list[RampPoint], tokens: int, limit: int | None
) -> Generator[Stage, StageOutcome, NodeCapacity]:
    """Ends a ramp whose last level did not fill: fewer answers came at once than requests were in flight.

    Finds out where the other requests waited: inside the server, or in the queue of the mesh. ``limit`` is how many
    requests the mesh sends to the node at once.
    """
    full, last = find_full_point(points), points[-1]
    reason, server_parallel = "these are all slots of its server", None
    if limit is not None and limit > last.running:
        context.notes.append(
            f"{node}: its server runs {last.running} at once, but the mesh sends it up to {limit}: max_parallel in"
            " mesh.yaml, or what the server reports, is too high, so requests wait inside it"
        )
    elif context.has_mesh and not last.waited_inside:
        outcome = yield _ramp_stage(context, node, last.level, tokens, is_direct=True)
        if outcome.results and outcome.results[0].served:
            direct = ramp_point(outcome.results[0], last.level, is_direct=True)
            points.append(direct)
            if direct.at_once > last.at_once:
                server_parallel = direct.at_once
                more = "or more " if direct.at_once == last.level else ""
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


def _has_stopped_growing(points: Sequence[RampPoint]) -> bool:
    """Whether the last level gives no more than the levels before it. An unknown rate has not grown."""
    level = points[-1].level
    rates = list(zip(points, ramp_rates(points), strict=True))
    lower = [rate for point, rate in rates if point.level < level]
    highest = max(rate for point, rate in rates if point.level == level)
    return bool(lower) and highest <= max(lower) * (1.0 + MIN_GROWTH)
