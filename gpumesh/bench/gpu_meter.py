"""GPU utilisation, power and energy during a stage, sampled from the mesh's snapshots.

This module does not run nvidia-smi. The mesh's probes do, at their own interval and over the same tunnels.
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

SAMPLE_S = 0.5
# The mesh asks nvidia-smi every two seconds, and the answer takes some time. A sample that is taken sooner after the
# start of a stage may show the GPU as it was before the stage.
LAG_S = 2.5
MIN_SAMPLES = 3  # with fewer samples a mean says little, and none is computed


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The use of GPUs during a stage. ``gpus`` and ``samples`` are counts. The utilisation is the mean over all GPUs
    and samples. ``power_w`` (mean) and ``energy_j`` are sums over all GPUs, ``None`` if the power of any GPU is
    unknown. ``memory_used_mib`` is the largest sum over all GPUs."""

    gpus: int
    samples: int
    utilization_pct: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    memory_used_mib: int | None = None


@dataclass(frozen=True, slots=True)
class GpuSample:
    at_s: float
    state: MeshState


def gpu_use(samples: Sequence[GpuSample], nodes: frozenset[str] | None = None) -> GpuUse | None:
    """The use of the GPUs of these nodes (of all nodes for ``None``). Pure. ``None`` when there are too few samples.

    A GPU counts once, by its UUID, even when several nodes report it. Samples of the first ``LAG_S`` are left out.
    Power is weighted by the time until the next sample. Energy is the mean power times the time between the very first
    sample and the last.
    """
    settled = [sample for sample in samples if sample.at_s - samples[0].at_s >= LAG_S]
    if len(settled) < MIN_SAMPLES:
        return None
    readings = [(sample.at_s, _gpus_by_uuid(sample.state, nodes)) for sample in settled]
    gpu_count = len({uuid for _, gpus in readings for uuid in gpus})
    if gpu_count == 0:
        return None
    utilizations = [
        gpu.utilization_pct for _, gpus in readings for gpu in gpus.values() if gpu.utilization_pct is not None
    ]
    memory_sums = [_complete_sum([gpu.memory_used_mib for gpu in gpus.values()], gpu_count) for _, gpus in readings]
    known_memory = [value for value in memory_sums if value is not None]
    times_s = [at_s for at_s, _ in readings]
    powers_w = [_complete_sum([gpu.power_w for gpu in gpus.values()], gpu_count) for _, gpus in readings]
    mean_w = _mean_power(times_s, powers_w)
    return GpuUse(
        gpus=gpu_count,
        samples=len(settled),
        utilization_pct=sum(utilizations) / len(utilizations) if utilizations else None,
        power_w=mean_w,
        energy_j=None if mean_w is None else mean_w * (samples[-1].at_s - samples[0].at_s),
        memory_used_mib=round(max(known_memory)) if known_memory else None,
    )


def _mean_power(times_s: Sequence[float], powers_w: Sequence[float | None]) -> float | None:
    """The mean over time: each power counts until the next reading. ``None`` if a power that counts is unknown."""
    energy_j = 0.0
    for (start_s, end_s), power_w in zip(itertools.pairwise(times_s), powers_w[:-1], strict=True):
        if power_w is None:
            return None
        energy_j += power_w * (end_s - start_s)
    seconds = times_s[-1] - times_s[0]
    mean_w = energy_j / seconds if seconds > 0 else math.nan
    return mean_w if math.isfinite(mean_w) else None


def _gpus_by_uuid(state: MeshState, nodes: frozenset[str] | None) -> dict[str, GpuState]:
    return {gpu.uuid: gpu for node in state.nodes if nodes is None or node.name in nodes for gpu in node.gpus or ()}


def _complete_sum(values: Sequence[float | None], expected: int) -> float | None:
    """The sum, or ``None`` unless all ``expected`` values are known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == expected else None


@asynccontextmanager
async def sample_gpus(
    status: Callable[[], Awaitable[MeshState]],
    *,
    interval_s: float = SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[list[GpuSample]]:
    """Takes a sample at the start of the context, then one after each ``interval_s``, and one at its end. The list that
    it yields is complete when the context has ended."""
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
