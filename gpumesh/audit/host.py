"""The audit's rule about a host's disk: too little free space for models (``disk-full``)."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.state import Finding, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

MIN_FREE_MIB = 2048  # the smallest models in wide use take more than this


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields ``disk-full`` if the disk that keeps the models has less than ``MIN_FREE_MIB`` of free space.

    No finding if the free space is unknown, or while the tunnel is not up: the last known value may be old then.
    """
    free_mib = state.host.store_free_mib
    if free_mib is None or free_mib >= MIN_FREE_MIB or state.tunnel.state is not TunnelPhase.UP:
        return
    yield Finding(
        "disk-full",
        Severity.WARNING,
        spec.name,
        f"only {free_mib / 1024:.1f} GiB are free where its models are kept: the next pull will fail",
        "`gpumesh models rm` what nobody uses, or point OLLAMA_MODELS at a larger disk",
    )
