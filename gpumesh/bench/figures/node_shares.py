"""Computes what each node did in a stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.figures.loaded_part import (
    LoadedPart,
    count_waited_inside,
    load_seconds,
    mean_busy,
    most_at_once,
    token_rate,
)
from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import summarize_sample


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The part of a stage's served requests that one node served: ``served`` is their number, ``share`` from 0 to 1.

    ``server_tokens_per_s`` is the mean rate of its answers by the server's clock. While all slots of the stage were
    busy, the node gave ``loaded_tokens_per_s`` and worked on ``busy`` requests at once, on the mean (``None``: there
    was no such part). ``most_at_once`` is the largest number of answers that came from it at once. ``waited_inside`` is
    the number of requests that waited inside the server for a slot (``None``: the server does not tell), and ``load_s``
    are the seconds that requests waited for a load of the model.
    """

    node: str
    served: int
    share: float
    output_tokens: int
    server_tokens_per_s: float | None = None
    loaded_tokens_per_s: float | None = None
    busy: float | None = None
    most_at_once: int = 0
    waited_inside: int | None = None
    load_s: float = 0.0


def node_shares(served: Sequence[LoadSample], loaded: LoadedPart | None) -> tuple[NodeShare, ...]:
    """The part of the served requests that each node has served, in the order of the nodes' names."""
    by_node: dict[str, list[LoadSample]] = {}
    for record in served:
        if record.node is not None:
            by_node.setdefault(record.node, []).append(record)
    shares: list[NodeShare] = []
    for node, records in sorted(by_node.items()):
        server_rates = summarize_sample(record.counters.tokens_per_s if record.counters else None for record in records)
        share = NodeShare(
            node,
            served=len(records),
            share=len(records) / len(served),
            output_tokens=sum(record.tokens or 0 for record in records),
            server_tokens_per_s=server_rates.mean,
            loaded_tokens_per_s=token_rate(records, loaded),
            busy=mean_busy(records, loaded),
            most_at_once=most_at_once(records),
            waited_inside=count_waited_inside(records),
            load_s=load_seconds(records),
        )
        shares.append(share)
    return tuple(shares)
