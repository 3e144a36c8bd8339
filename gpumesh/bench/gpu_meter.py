"""What the GPUs did while a stage ran: utilisation, power and energy, from the mesh's own snapshots of nvidia-smi.

Sampling only; nvidia-smi is asked by the mesh's probes, at their pace, over the same tunnels.
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
# What the mesh knows of a GPU is as old as its last question to nvidia-smi, which comes each two seconds and takes its
# time: what is sampled sooner after a stage's beginning may still be of what was before.
LAG_S = 2.5
# Fewer moments than this tell nothing of a mean.
MIN_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class GpuUse:
    """Means over the stage; ``power_w`` and ``energy_j`` are of all GPUs together, ``None`` where one is unknown."""

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
    """Pure. The GPUs of these nodes (all, if ``None``), each once by its UUID; ``None`` when too little is known.

    The first ``LAG_S`` tell of what was before and are left out. Power is weighted by the time until the next sample;
    energy is that mean times the time between the first sample of all and the last.
    """
    settled = [sample for sample in samples if sample.at_s - samples[0].at_s >= LAG_S]
    if len(settled) < MIN_SAMPLES:
        return None
    moments = [(sample.at_s, _gpus(sample.state, nodes)) for sample in settled]
    seen = {uuid for _, gpus in moments for uuid in gpus}
    if not seen:
        return None
    seconds = moments[-1][0] - moments[0][0]
    powers = [_total([gpu.power_w for gpu in gpus.values()], len(seen)) for _, gpus in moments]
    loads = [gpu.utilization_pct for _, gpus in moments for gpu in gpus.values() if gpu.utilization_pct is not None]
    memory = [_total([gpu.memory_used_mib for gpu in gpus.values()], len(seen)) for _, gpus in moments]
    spent = 0.0
    for ((now, _), (later, _)), power in zip(itertools.pairwise(moments), powers, strict=False):
        spent += math.nan if power is None else power * (later - now)
    mean_w = spent / seconds if math.isfinite(spent) and seconds > 0 else None
    most = [value for value in memory if value is not None]
    return GpuUse(
        gpus=len(seen),
        samples=len(settled),
        utilization_pct=sum(loads) / len(loads) if loads else None,
        power_w=mean_w,
        energy_j=None if mean_w is None else mean_w * (samples[-1].at_s - samples[0].at_s),
        memory_used_mib=round(max(most)) if most else None,
    )


def _gpus(state: MeshState, nodes: frozenset[str] | None) -> dict[str, GpuState]:
    return {gpu.uuid: gpu for node in state.nodes if nodes is None or node.name in nodes for gpu in node.gpus or ()}


def _total(values: Sequence[float | None], expected: int) -> float | None:
    """A sum in which nothing is missing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == expected else None


@asynccontextmanager
async def sample_gpus(
    status: Callable[[], Awaitable[MeshState]],
    *,
    interval_s: float = SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[list[GpuSample]]:
    """Samples while its context is open, at its beginning and its end too; the list may be read after it."""
    samples: list[GpuSample] = []

    async def take() -> None:
        state = await status()
        samples.append(GpuSample(clock(), state))

    async def keep_taking() -> None:
        while True:
            await asyncio.sleep(interval_s)
            await take()

    await take()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keep_taking())
        yield samples
        task.cancel()
    await take()
