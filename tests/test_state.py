"""Sums over the pool: each GPU once, and unknown is not 0."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumesh.state import (
    BackendState,
    GpuState,
    Health,
    NodeState,
    Totals,
    TunnelPhase,
    TunnelState,
    compute_totals,
    free_mib,
)
from tests.cli import states

GPU = GpuState(0, "GPU-1", "RTX 4090", 24564, 5632, 18560)


def node(name: str, *gpus: GpuState, health: Health = Health.HEALTHY, rate: float | None = None) -> NodeState:
    return NodeState(
        name,
        health,
        None,
        TunnelState("direct", TunnelPhase.UP),
        BackendState("ollama", tokens_per_s=rate),
        gpus=gpus,
    )


def test_an_empty_mesh_knows_nothing() -> None:
    assert compute_totals(()) == Totals(0, 0, None, None, None, None, 0.0)


def test_unknown_is_not_zero() -> None:
    blind = replace(node("a"), gpus=None)
    assert compute_totals((blind,)).gpus is None
    assert compute_totals((blind, node("b"))).gpus == 0, "truly none there"
    assert compute_totals((blind, node("b", GPU))) == Totals(2, 2, 1, 24564, 5632, 18560, 0.0)


def test_a_shared_gpu_counts_once() -> None:
    other = replace(GPU, uuid="GPU-2")
    sums = compute_totals((node("a", GPU), node("b", GPU, other), node("c", other)))
    assert (sums.gpus, sums.vram_total_mib, sums.vram_used_mib, sums.vram_free_mib) == (2, 49128, 11264, 37120)


def test_figures_that_a_gpu_keeps_to_itself() -> None:
    silent = GpuState(1, "GPU-2", "x")
    assert compute_totals((node("a", silent),)) == Totals(1, 1, 1, None, None, None, 0.0)
    assert compute_totals((node("a", silent, GPU),)).vram_total_mib == 24564


def test_nodes_up_are_healthy_or_degraded() -> None:
    nodes = tuple(node(health.value, health=health) for health in Health)
    assert compute_totals(nodes).nodes_up == 2, "healthy and degraded serve; draining, down and unknown do not"


def test_rates_add_up() -> None:
    assert compute_totals((node("a", rate=10.5), node("b"), node("c", rate=2.0))).tokens_per_s == 12.5


@pytest.mark.parametrize(
    ("gpu", "free"),
    [
        (GPU, 18560),
        (replace(GPU, memory_free_mib=None), 18932),
        (replace(GPU, memory_free_mib=None, memory_used_mib=None), None),
        (replace(GPU, memory_free_mib=None, memory_total_mib=None), None),
        (replace(GPU, memory_free_mib=None, memory_used_mib=30000), 0),
        (replace(GPU, memory_free_mib=0), 0),
    ],
)
def test_free_memory(gpu: GpuState, free: int | None) -> None:
    """As the driver says: it keeps a reserve."""
    assert free_mib(gpu) == free


def test_a_node_by_its_name() -> None:
    mesh = states.typical()
    assert mesh.node("iceland").name == "iceland"
    with pytest.raises(KeyError):
        mesh.node("nowhere")
