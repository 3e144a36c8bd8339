"""The tokens per second that views show of a node."""

from __future__ import annotations

from gpumesh.state import NodeState


def rate_now(node: NodeState) -> float | None:
    """The node's tokens per second; 0 as soon as nothing is in flight, ``None`` if the node has not worked yet.

    The figure in the state is a mean over the last seconds. It is right for a history, but a person would ask which
    request makes these tokens."""
    rate = node.backend.tokens_per_s
    return 0.0 if rate is not None and node.load.in_flight == 0 else rate
