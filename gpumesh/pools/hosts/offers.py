"""What a host offers to a pool: its GPUs as nvidia-smi sees them, or its CPU. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpumesh.pool_spec import PoolMember
from gpumesh.pools.base import DeviceOffer, HostOffer
from gpumesh.pools.hosts.programs import HostPrograms
from gpumesh.probes.nvidia_smi import GpuReport
from gpumesh.state import GpuState, LoadedModel, free_mib

MIB = 1 << 20

FindBandwidth = Callable[[str], float | None]
"""The bytes per second at which a GPU of this name, or the CPU, reads its memory; ``None``: unknown."""


def host_offer(
    report: GpuReport,
    member: PoolMember,
    programs: HostPrograms,
    *,
    loaded: Sequence[LoadedModel] = (),
    find_bandwidth: FindBandwidth = lambda _name: None,
) -> HostOffer:
    """The offer of one member, from nvidia-smi's report and from what llama.cpp sees there.

    ``loaded`` are the models that the node's Ollama has in memory. ``find_bandwidth`` knows the speeds of devices.
    """
    limit_bytes = None if member.memory_mib is None else member.memory_mib * MIB
    if report.gpus:
        return _offer_gpus(report.gpus, member.node, limit_bytes, programs, loaded, find_bandwidth)
    if report.error is not None and limit_bytes is None:
        return HostOffer(
            member.node,
            problem=f"its GPUs are not known: {report.error}",
            hint="`gpumesh audit` says more; with `memory` it takes part on its CPU",
        )
    if limit_bytes is None:
        return HostOffer(
            member.node,
            problem="it has no GPU that nvidia-smi knows",
            hint="with `memory: 8GiB` in the pool's `nodes`, it takes part on its CPU",
        )
    free_bytes = limit_bytes if programs.memory_free_bytes is None else programs.memory_free_bytes
    device = DeviceOffer(
        "CPU", None, programs.memory_total_bytes, min(free_bytes, limit_bytes), bytes_per_s=find_bandwidth("CPU")
    )
    return HostOffer(member.node, (device,), limit_bytes)


def _offer_gpus(
    gpus: Sequence[GpuState],
    node: str,
    limit_bytes: int | None,
    programs: HostPrograms,
    loaded: Sequence[LoadedModel],
    find_bandwidth: FindBandwidth,
) -> HostOffer:
    if programs.devices and len(programs.gpus) < len(gpus):
        seen = ", ".join(device.name for device in programs.devices)
        count = "a GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        return HostOffer(
            node,
            limit_bytes=limit_bytes,
            problem=f"it has {count} by nvidia-smi, but llama.cpp there sees only: {seen}",
            hint="build llama.cpp there with -DGGML_CUDA=ON, or install the release for its GPUs",
        )
    devices = tuple(
        DeviceOffer(
            name=gpu.name,
            index=gpu.index,
            total_bytes=None if gpu.memory_total_mib is None else gpu.memory_total_mib * MIB,
            free_bytes=(free_mib(gpu) or 0) * MIB,  # unknown: a GPU with memory of the host's own
            bytes_per_s=find_bandwidth(gpu.name),
            held_by_others=_held_by_ollama_mib(gpu, gpus, loaded) * MIB,
        )
        for gpu in sorted(gpus, key=lambda gpu: gpu.index)
    )
    return HostOffer(node, devices, limit_bytes)


def _held_by_ollama_mib(gpu: GpuState, gpus: Sequence[GpuState], loaded: Sequence[LoadedModel]) -> int:
    """The memory of this GPU that the host's Ollama could free: what its processes use there by nvidia-smi, or else,
    with one GPU, what its loaded models use by its own figures."""
    used_mib = sum(
        process.used_memory_mib or 0 for process in gpu.processes if "ollama" in process.name.rpartition("/")[2]
    )
    if not used_mib and len(gpus) == 1:
        used_mib = sum(model.size_vram_mib or 0 for model in loaded)
    return min(used_mib, gpu.memory_used_mib if gpu.memory_used_mib is not None else used_mib)
