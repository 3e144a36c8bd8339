"""The split that mesh.yaml gives (``split:``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.hosts import Hosts
from gpumesh.pools.planning.memory import Slot
from gpumesh.pools.planning.split import Model, Split, split_as_given


def find_split_problem(spec: PoolSpec, shape: ModelShape) -> str | None:
    """What is wrong with ``split:`` for this model."""
    if spec.split is None:
        return None
    if len(spec.split) != len(spec.members):
        return f"split: has {len(spec.split)} numbers for {len(spec.members)} members."
    if sum(spec.split) != shape.layers:
        return f"split: gives away {sum(spec.split)} layers, and the model has {shape.layers}."
    return None


def split_as_written(spec: PoolSpec, model: Model, hosts: Hosts) -> Split:
    """Each member gets the layers that mesh.yaml gives it; several GPUs of a member share them by their memory. The
    output is on the last device that has layers."""
    layers = dict(zip((member.node for member in spec.members), spec.split or (), strict=True))
    workers = [worker for worker in hosts.workers if layers[worker.node]]
    slots = tuple(slot for slot in hosts.chain(workers) if layers[slot.node])
    counts: list[int] = []
    for slot in slots:
        of_node = [other for other in slots if other.node == slot.node]
        counts.append(_shares_of_node(of_node, layers[slot.node])[of_node.index(slot)])
    placed = sum(counts)
    if not slots or placed < len(model.needs) - 1:
        absent = model.needed_before[-1] - model.needed_before[placed]
        return replace(split_as_given(model, slots, counts), missing_bytes=max(1, absent))
    last = max(index for index, count in enumerate(counts) if count)
    counts[last] += 1
    return split_as_given(model, slots, counts)


def _shares_of_node(slots: Sequence[Slot], layers: int) -> list[int]:
    """``layers`` divided in proportion to the memory of a node's devices."""
    total = sum(slot.for_layers for slot in slots) or 1
    counts, given, before = [], 0, 0
    for slot in slots:
        before += slot.for_layers
        upto = layers if slot is slots[-1] else round(layers * before / total)
        counts.append(upto - given)
        given = upto
    return counts
