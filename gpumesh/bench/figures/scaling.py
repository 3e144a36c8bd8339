"""How well the mesh uses its nodes: its rate against the sum of the nodes alone, and the reasons for the loss. Pure.

A node alone gives ``alone`` tokens/s while it works on ``slots`` requests at once, so a slot of it gives
``alone ÷ slots``. In the mesh's stage it gives ``mesh`` tokens/s while it works on ``busy`` requests. The difference
``alone - mesh`` is exactly the sum of three parts:

- starved: ``(slots - busy) * alone / slots``: slots that had no request
- swapped: the slots whose request waited for a load of the model, times ``alone / slots``
- slowed: what is left: each busy slot gave less than alone, because of its neighbours, the way there, or the host
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.node_shares import NodeShare
from gpumesh.bench.figures.summary import StageResult
from gpumesh.bench.stats import ratio
from gpumesh.bench.workload.stages import StageKind

# An efficiency outside these bounds needs an explanation.
LEAST_EXPECTED, MOST_EXPECTED = 0.95, 1.05


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """What one node gave alone and in the mesh, in tokens/s, and the three parts of the difference (see the module).

    A part is negative if the node gave more in the mesh. ``slots`` and ``busy`` are how many requests the node worked
    on at once, on the mean.
    """

    node: str
    alone_tokens_per_s: float
    mesh_tokens_per_s: float
    slots: float
    busy: float
    starved_tokens_per_s: float
    swapped_tokens_per_s: float
    slowed_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Scaling:
    """How well the mesh uses its nodes. ``efficiency``: the mesh's output tokens/s ÷ the sum of the nodes alone.

    1 is perfect. ``nodes`` are the names and rates of the nodes alone. All rates are ``Rates.loaded_tokens_per_s``, or
    ``Rates.output_tokens_per_s`` if one of these is unknown. ``losses`` says where the difference went; it is empty if
    that is unknown. ``tail_share``: the share of the mesh's rate that its ramp and its tail would cost a batch of just
    these requests; the efficiency is without it. ``explanation`` is a sentence that says why the efficiency is not
    what one would expect, ``None`` if it is.
    """

    mesh_tokens_per_s: float
    sum_tokens_per_s: float
    efficiency: float
    nodes: tuple[tuple[str, float], ...] = ()
    losses: tuple[NodeLoss, ...] = ()
    tail_share: float | None = None
    explanation: str | None = None


def scaling(stages: Sequence[StageResult]) -> Scaling | None:
    """Compares the output rate of the mesh's last stage with that of the nodes alone.

    ``None`` if there are fewer than two nodes or no stage of the mesh, or if one of them produced no tokens.
    """
    # Left out: a stage with routes, which measures the routes, and a stage that was disturbed.
    node_stages = [stage for stage in stages if stage.kind is StageKind.NODE and stage.node and stage.route is None]
    mesh_stages = [stage for stage in stages if stage.kind is StageKind.MESH and not stage.disturbance]
    if not mesh_stages or len(node_stages) < 2:  # a single node cannot scale
        return None
    mesh = mesh_stages[-1]
    compared = [*node_stages, mesh]
    rates = [stage.rates.loaded_tokens_per_s for stage in compared]
    if not all(rates):  # one is unknown or 0: so all are replaced, because only rates of one kind can be compared
        rates = [stage.rates.output_tokens_per_s for stage in compared]
    known_rates = [value for value in rates if value]
    if len(known_rates) != len(compared):  # a stage produced no tokens
        return None
    *node_rates, mesh_rate = known_rates
    sum_of_nodes = math.fsum(node_rates)
    by_node = tuple((stage.node or "", value) for stage, value in zip(node_stages, node_rates, strict=True))
    efficiency = mesh_rate / sum_of_nodes
    losses = _losses(node_stages, mesh)
    wall_share = ratio(mesh.rates.output_tokens_per_s, mesh.rates.loaded_tokens_per_s)
    return Scaling(
        mesh_rate,
        sum_of_nodes,
        efficiency,
        by_node,
        losses=losses,
        tail_share=None if wall_share is None else 1.0 - wall_share,
        explanation=_explain(efficiency, losses, node_stages, mesh),
    )


def _losses(node_stages: Sequence[StageResult], mesh: StageResult) -> tuple[NodeLoss, ...]:
    """The losses of all nodes. Empty if they are unknown for one node: then the parts have no sum."""
    in_mesh = {share.node: share for share in mesh.nodes}
    losses: list[NodeLoss] = []
    for stage in node_stages:
        name = stage.node or ""
        alone = next((share for share in stage.nodes if share.node == name), None)
        # A node that served nothing in the mesh's stage has no share there: its slots were all starved.
        together = in_mesh.get(name, NodeShare(name, 0, 0.0, 0, loaded_tokens_per_s=0.0, busy=0.0))
        loss = None if alone is None else _node_loss(alone, together, mesh.rates.loaded_s)
        if loss is None:
            return ()
        losses.append(loss)
    return tuple(losses)


def _node_loss(alone: NodeShare, together: NodeShare, loaded_s: float | None) -> NodeLoss | None:
    """Splits the difference between a node's rate alone and in the mesh. ``loaded_s``: how long all slots were busy in
    the mesh's stage. ``None`` if a figure is unknown, or if the node gave nothing alone."""
    alone_rate, mesh_rate = alone.loaded_tokens_per_s, together.loaded_tokens_per_s
    if not alone_rate or mesh_rate is None or not alone.busy or together.busy is None or not loaded_s:
        return None
    slot_rate = alone_rate / alone.busy
    starved = (alone.busy - together.busy) * slot_rate
    # The mean number of slots whose request waited for a load. ``load_s`` also has the loads outside ``loaded_s``, so
    # the quotient can be larger than the number of busy slots.
    loading_slots = min(together.load_s / loaded_s, together.busy)
    swapped = loading_slots * slot_rate
    return NodeLoss(
        node=alone.node,
        alone_tokens_per_s=alone_rate,
        mesh_tokens_per_s=mesh_rate,
        slots=alone.busy,
        busy=together.busy,
        starved_tokens_per_s=starved,
        swapped_tokens_per_s=swapped,
        slowed_tokens_per_s=alone_rate - mesh_rate - starved - swapped,
    )


def _explain(
    efficiency: float, losses: Sequence[NodeLoss], node_stages: Sequence[StageResult], mesh: StageResult
) -> str | None:
    """Says why the efficiency is not near 1: the largest single reason. ``None`` if it is near 1."""
    if LEAST_EXPECTED <= efficiency <= MOST_EXPECTED:
        return None
    alone_names = {stage.node for stage in node_stages}
    others = [share.node for share in mesh.nodes if share.node not in alone_names]
    if efficiency > MOST_EXPECTED and others:
        return f"the mesh also used {', '.join(others)}, which was not measured alone"
    if not losses:
        return "the stages were too short to say why: measure more requests (-n)"
    sign = 1.0 if efficiency < 1.0 else -1.0
    reasons: list[tuple[float, str]] = []
    for loss in losses:
        alone_each, mesh_each = loss.alone_tokens_per_s / loss.slots, ratio(loss.mesh_tokens_per_s, loss.busy) or 0.0
        more_alone = loss.starved_tokens_per_s > 0
        reasons.append(
            (
                loss.starved_tokens_per_s * sign,
                f"{loss.node} worked on {loss.busy:.1f} requests at once in the mesh and on {loss.slots:.1f} alone: "
                + ("its slots were starved" if more_alone else "alone it was not at its capacity"),
            )
        )
        reasons.append(
            (
                loss.slowed_tokens_per_s * sign,
                f"{loss.node} gave each request {mesh_each:.0f} tok/s in the mesh and {alone_each:.0f} alone: "
                + ("its neighbours slowed it" if loss.slowed_tokens_per_s > 0 else "something slowed it while alone"),
            )
        )
        reasons.append(
            (loss.swapped_tokens_per_s * sign, f"{loss.node} loaded the model during the mesh's stage: it was swapped")
        )
    return max(reasons)[1]
