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
# With fewer samples no mean is computed.
MIN_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Means over the stage. ``power_w`` and ``energy_j`` are sums over all GPUs, ``None`` if any of them is unknown."""

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
    uuids = {uuid for _, gpus in readings for uuid in gpus}
    if not uuids:
        return None
    seconds = readings[-1][0] - readings[0][0]
    powers = [_complete_sum([gpu.power_w for gpu in gpus.values()], len(uuids)) for _, gpus in readings]
    loads = [gpu.utilization_pct for _, gpus in readings for gpu in gpus.values() if gpu.utilization_pct is not None]
    memory = [_complete_sum([gpu.memory_used_mib for gpu in gpus.values()], len(uuids)) for _, gpus in readings]
    energy_j = 0.0
    for ((start_s, _), (end_s, _)), power in zip(itertools.pairwise(readings), powers, strict=False):
        energy_j += math.nan if power is None else power * (end_s - start_s)
    mean_w = energy_j / seconds if math.isfinite(energy_j) and seconds > 0 else None
    known_memory = [value for value in memory if value is not None]
    return GpuUse(
        gpus=len(uuids),
        samples=len(settled),
        utilization_pct=sum(loads) / len(loads) if loads else None,
        power_w=mean_w,
        energy_j=None if mean_w is None else mean_w * (samples[-1].at_s - samples[0].at_s),
        memory_used_mib=round(max(known_memory)) if known_memory else None,
    )


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
    """Takes samples while the context is open, and one each at its start and its end. The list stays valid after it."""
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
