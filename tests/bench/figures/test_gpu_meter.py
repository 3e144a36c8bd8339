"""What GPUs did while a stage ran: the arithmetic by hand, the sampling on a clock of the test's own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from gpumesh.bench.figures.gpu_meter import LAG_S, GpuSample, GpuUse, gpu_use, sample_gpus
from gpumesh.state import (
    BackendState,
    GatewayState,
    GpuState,
    Health,
    MeshState,
    NodeState,
    TunnelState,
    compute_totals,
)


def gpu(
    uuid: str = "GPU-1", *, power: float | None = 300.0, busy: int | None = 90, used: int | None = 8000
) -> GpuState:
    return GpuState(0, uuid, "NVIDIA GeForce RTX 4090", power_w=power, utilization_pct=busy, memory_used_mib=used)


def node(name: str, *gpus: GpuState) -> NodeState:
    return NodeState(name, Health.HEALTHY, None, TunnelState("sshtunnel"), BackendState("ollama"), gpus=gpus)


def mesh(*nodes: NodeState) -> MeshState:
    at = datetime(2026, 11, 24, tzinfo=UTC)
    return MeshState("home", at, GatewayState(), compute_totals(nodes), nodes, ())


def samples(*states: tuple[float, MeshState]) -> list[GpuSample]:
    return [GpuSample(at_s, state) for at_s, state in states]


IDLE = mesh(node("alpha", gpu(power=20.0, busy=0, used=500)))


def test_power_is_weighted_by_time_and_energy_is_that_of_the_whole_stage() -> None:
    """What is known in the first seconds is of what was before."""
    busy, busier = mesh(node("alpha", gpu(power=200.0, busy=50))), mesh(node("alpha", gpu(power=400.0, busy=100)))
    made = gpu_use(samples((100.0, IDLE), (102.0, IDLE), (103.0, busy), (104.0, busier), (107.0, busy)))
    assert made == GpuUse(
        gpus=1,
        samples=3,
        utilization_pct=(50 + 100 + 50) / 3,
        power_w=(200.0 * 1 + 400.0 * 3) / 4,
        energy_j=350.0 * 7,
        memory_used_mib=8000,
    )


def test_a_short_stage_tells_nothing_of_its_gpus() -> None:
    short = samples((0.0, IDLE), (1.0, IDLE), (LAG_S - 0.01, IDLE), (LAG_S, IDLE), (LAG_S + 0.5, IDLE))
    assert gpu_use(short) is None
    assert gpu_use([*short, GpuSample(LAG_S + 1.0, IDLE)]) is not None
    assert gpu_use([]) is None


def over(state: MeshState, nodes: frozenset[str] | None = None) -> GpuUse | None:
    return gpu_use(samples(*((float(second), state) for second in range(8))), nodes)


def test_only_the_nodes_that_were_measured() -> None:
    both = mesh(node("alpha", gpu("GPU-1", power=100.0)), node("beta", gpu("GPU-2", power=250.0, busy=10, used=3000)))
    made = over(both, frozenset({"beta"}))
    assert made is not None
    assert (made.gpus, made.utilization_pct, made.memory_used_mib) == (1, 10.0, 3000)
    assert made.power_w == pytest.approx(250.0)
    whole = over(both)
    assert whole is not None
    assert (whole.gpus, whole.utilization_pct, whole.memory_used_mib) == (2, 50.0, 11000)
    assert whole.power_w == pytest.approx(350.0)
    assert over(both, frozenset({"gamma"})) is None


def test_two_ways_to_one_gpu_are_one_gpu() -> None:
    made = over(mesh(node("alpha", gpu("GPU-1")), node("again", gpu("GPU-1"))))
    assert made is not None
    assert made.gpus == 1
    assert made.power_w == pytest.approx(300.0)


def test_what_is_not_known_of_one_is_not_known_of_all() -> None:
    made = over(mesh(node("alpha", gpu("GPU-1")), node("beta", gpu("GPU-2", power=None, busy=None, used=None))))
    assert made is not None
    assert (made.power_w, made.energy_j, made.memory_used_mib) == (None, None, None)
    assert made.utilization_pct is None, "a mean without one of them is not the mean of all"
    assert made.power_unknown == ("beta",)


def test_a_node_that_cannot_say() -> None:
    silent = mesh(replace(node("alpha"), gpus=None))
    assert over(silent) is None
    assert over(mesh(node("alpha"))) is None


async def test_sampling_goes_on_while_the_stage_runs() -> None:
    asked = asyncio.Queue[None]()
    now = 10.0

    async def status() -> MeshState:
        asked.put_nowait(None)
        return IDLE

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    async with asyncio.timeout(20), sample_gpus(status, interval_s=0.001, clock=clock) as taken:
        for _ in range(5):
            await asked.get()
    assert len(taken) >= 6, "at the end once more"
    assert [sample.at_s for sample in taken] == sorted(sample.at_s for sample in taken)
    count = len(taken)
    await asyncio.sleep(0.01)
    assert len(taken) == count


async def test_a_stage_that_fails_ends_the_sampling() -> None:
    async def status() -> MeshState:
        return IDLE

    with pytest.raises(ExceptionGroup) as caught:
        async with sample_gpus(status, interval_s=0.001):
            raise ZeroDivisionError
    assert caught.group_contains(ZeroDivisionError)
