"""Computes what each node served in a stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.bench.load.samples import LoadSample
from gpumesh.bench.stats import summarize_sample


@dataclass(frozen=True, slots=True)
class NodeShare:
    """The part of a stage's served requests that one node served: ``served`` is their number, ``share`` from 0 to 1.

    ``server_tokens_per_s`` is the mean rate of its answers by the server's clock.
    """

    node: str
    served: int
    share: float
    output_tokens: int
    server_tokens_per_s: float | None = None


def node_shares(served: Sequence[LoadSample]) -> tuple[NodeShare, ...]:
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
        )
        shares.append(share)
    return tuple(shares)
