"""Measures GPU utilisation, power and energy during a stage, from snapshots of the mesh's state.

This module does not run nvidia-smi. The mesh's probes run it, at their own interval and over the same tunnels.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gpumesh.state import GpuState, MeshState

SAMPLE_S = 0.5  # seconds between two samples
# The mesh asks nvidia-smi every two seconds, and the answer takes some time. A sample that is taken sooner after the
# start of a stage may show the GPU as it was before the stage.
LAG_S = 2.5
MIN_SAMPLES = 3  # with fewer samples a mean says little, and none is computed


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The use of GPUs during a stage. ``gpus`` and ``samples`` are counts.

    The utilisation is the mean over all GPUs and samples. ``power_w`` is the mean of the power of all GPUs together,
    and ``energy_j`` their energy. Both are ``None`` if the power of one of the measured nodes is unknown:
    ``power_unknown`` names these nodes. ``memory_used_mib`` is the largest amount that all GPUs together used at one
    moment.
    """

    gpus: int
    samples: int
    utilization_pct: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    memory_used_mib: int | None = None
    power_unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuSample:
    """The mesh's state at one moment. ``at_s`` is the time on the sampling clock, in seconds."""

    at_s: float
    state: MeshState


def gpu_use(samples: Sequence[GpuSample], nodes: frozenset[str] | None = None) -> GpuUse | None:
    """Computes the use of the GPUs of these nodes (``None``: of all nodes) from the samples of one stage. Pure.

    Returns ``None`` when there are too few samples, or no GPU. A GPU counts once, by its UUID, even when several nodes
    report it. Samples of the first ``LAG_S`` are left out, because they may show the GPUs before the stage. Energy is
    the mean power times the time of the whole stage, from the very first sample to the last. A sum over all GPUs is
    unknown for a sample in which one of the GPUs, or its value, is missing. The power is unknown, too, if a node lists
    no GPU: it may have one that nvidia-smi does not show, or it computes on its CPU.
    """
    used_samples = [sample for sample in samples if sample.at_s - samples[0].at_s >= LAG_S]
    if len(used_samples) < MIN_SAMPLES:
        return None
    gpus_of_samples = [_gpus_by_uuid(sample.state, nodes) for sample in used_samples]
    gpu_count = len({uuid for gpus in gpus_of_samples for uuid in gpus})
    if gpu_count == 0:
        return None
    power_unknown = _nodes_without_power(used_samples, nodes)
    gpus_with_utilization = {
        uuid for gpus in gpus_of_samples for uuid, gpu in gpus.items() if gpu.utilization_pct is not None
    }
    utilizations = [gpu.utilization_pct for gpus in gpus_of_samples for gpu in gpus.values()]
    known_utilizations = [value for value in utilizations if value is not None]
    # A mean without one of the GPUs is not the mean of all.
    has_utilizations = len(gpus_with_utilization) == gpu_count
    memory_sums = [_complete_sum([gpu.memory_used_mib for gpu in gpus.values()], gpu_count) for gpus in gpus_of_samples]
    known_memory_sums = [value for value in memory_sums if value is not None]
    times_s = [sample.at_s for sample in used_samples]
    powers_w = [_complete_sum([gpu.power_w for gpu in gpus.values()], gpu_count) for gpus in gpus_of_samples]
    mean_w = None if power_unknown else _mean_power(times_s, powers_w)
    return GpuUse(
        gpus=gpu_count,
        samples=len(used_samples),
        utilization_pct=sum(known_utilizations) / len(known_utilizations) if has_utilizations else None,
        power_w=mean_w,
        energy_j=None if mean_w is None else mean_w * (samples[-1].at_s - samples[0].at_s),
        memory_used_mib=round(max(known_memory_sums)) if known_memory_sums else None,
        power_unknown=power_unknown,
    )


def _nodes_without_power(samples: Sequence[GpuSample], nodes: frozenset[str] | None) -> tuple[str, ...]:
    """The names of the nodes of which a sample has no GPU, or a GPU without its power."""
    unknown = {
        node.name
        for sample in samples
        for node in sample.state.nodes
        if nodes is None or node.name in nodes
        if not node.gpus or any(gpu.power_w is None for gpu in node.gpus)
    }
    return tuple(sorted(unknown))


def _mean_power(times_s: Sequence[float], powers_w: Sequence[float | None]) -> float | None:
    """The mean power over time, in W: each reading counts until the next reading.

    So the last reading does not count. ``None`` if a reading that counts is unknown, or if no time passed.
    """
    energy_j = 0.0
    for (start_s, end_s), power_w in zip(itertools.pairwise(times_s), powers_w[:-1], strict=True):
        if power_w is None:
            return None
        energy_j += power_w * (end_s - start_s)
    seconds = times_s[-1] - times_s[0]
    if seconds <= 0:
        return None
    mean_w = energy_j / seconds
    return mean_w if math.isfinite(mean_w) else None  # not finite: a reading was infinite or not a number


def _gpus_by_uuid(state: MeshState, nodes: frozenset[str] | None) -> dict[str, GpuState]:
    """The GPUs of these nodes (``None``: of all nodes), by UUID."""
    selected = [node for node in state.nodes if nodes is None or node.name in nodes]
    return {gpu.uuid: gpu for node in selected for gpu in node.gpus or ()}


def _complete_sum(values: Sequence[float | None], expected_count: int) -> float | None:
    """The sum of the values; ``None`` if fewer than ``expected_count`` of them are known."""
    known_values = [value for value in values if value is not None]
    return math.fsum(known_values) if len(known_values) == expected_count else None


@asynccontextmanager
async def sample_gpus(
    status: Callable[[], Awaitable[MeshState]],
    *,
    interval_s: float = SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[list[GpuSample]]:
    """Takes samples while the context lasts: at its start, after each ``interval_s`` (seconds), and at its end.

    ``status`` returns the mesh's state. The list that this yields is complete when the context has ended.
    """
    samples: list[GpuSample] = []

    async def take_sample() -> None:
        state = await status()
        samples.append(GpuSample(clock(), state))

    async def keep_sampling() -> None:
        while True:
            await asyncio.sleep(interval_s)
            await take_sample()

    await take_sample()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keep_sampling())
        yield samples
        task.cancel()
    await take_sample()
