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
# Fewer moments than this tell nothing of a mean.
ENOUGH = 3


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
class Sample:
    at_s: float
    state: MeshState


def gpu_use(samples: Sequence[Sample], nodes: frozenset[str] | None = None) -> GpuUse | None:
    """Pure. The GPUs of these nodes (all, if ``None``), each once by its UUID; ``None`` when too little is known.

    Energy is the mean power, each sample weighted by the time until the next, times the time between first and last.
    """
    if len(samples) < ENOUGH:
        return None
    moments = [(sample.at_s, _gpus(sample.state, nodes)) for sample in samples]
    seen = {uuid for _, gpus in moments for uuid in gpus}
    if not seen:
        return None
    seconds = moments[-1][0] - moments[0][0]
    powers = [_total([gpu.power_w for gpu in gpus.values()], len(seen)) for _, gpus in moments]
    loads = [gpu.utilization_pct for _, gpus in moments for gpu in gpus.values() if gpu.utilization_pct is not None]
    memory = [_total([gpu.memory_used_mib for gpu in gpus.values()], len(seen)) for _, gpus in moments]
    energy = 0.0
    for ((now, _), (later, _)), power in zip(itertools.pairwise(moments), powers, strict=False):
        energy += math.nan if power is None else power * (later - now)
    known = math.isfinite(energy) and seconds > 0
    most = [value for value in memory if value is not None]
    return GpuUse(
        gpus=len(seen),
        samples=len(samples),
        utilization_pct=sum(loads) / len(loads) if loads else None,
        power_w=energy / seconds if known else None,
        energy_j=energy if known else None,
        memory_used_mib=round(max(most)) if most else None,
    )


def _gpus(state: MeshState, nodes: frozenset[str] | None) -> dict[str, GpuState]:
    return {gpu.uuid: gpu for node in state.nodes if nodes is None or node.name in nodes for gpu in node.gpus or ()}


def _total(values: Sequence[float | None], expected: int) -> float | None:
    """A sum in which nothing is missing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == expected else None


@asynccontextmanager
async def metered(
    status: Callable[[], Awaitable[MeshState]],
    *,
    interval_s: float = SAMPLE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncGenerator[list[Sample]]:
    """Samples while its context is open, at its beginning and its end too; the list may be read after it."""
    samples: list[Sample] = []

    async def take() -> None:
        state = await status()
        samples.append(Sample(clock(), state))

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
