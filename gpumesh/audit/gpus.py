"""The GPUs that mesh.yaml expects against those that nvidia-smi shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.state import Finding, GpuState, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

# Drivers differ by some MiB in what they keep for themselves; the next smaller card differs by far more.
VRAM_TOLERANCE = 0.02


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    gpus, expect, node = state.gpus, spec.expect, spec.name
    if gpus is None or state.tunnel.state is not TunnelPhase.UP:
        return
    expected = expect.gpus != 0 and any(one is not None for one in (expect.gpus, expect.gpu, expect.vram_mib))
    if expected and not gpus:
        what = expect.gpu or "a GPU"
        yield Finding(
            "gpu-missing",
            Severity.ERROR,
            node,
            f"{what} was expected, no GPU is there",
            "check that it is the right machine, and that its container was started with its GPUs (`--gpus all`)",
        )
        return
    if expect.gpus is not None and len(gpus) != expect.gpus:
        yield Finding(
            "gpu-count",
            Severity.ERROR if len(gpus) < expect.gpus else Severity.INFO,
            node,
            describe_gpu_count(len(gpus), expect.gpus),
            "one may have fallen off the bus (`dmesg | grep -i nvrm`), or be kept from the container; "
            "if it is meant so, change `expect.gpus`",
        )
    others = [gpu for gpu in gpus if expect.gpu is not None and not gpu_name_matches(expect.gpu, gpu.name)]
    if others:
        yield Finding(
            "gpu-differs",
            Severity.WARNING,
            node,
            f"{_names(others)} is there, expected was {expect.gpu}",
            "another machine may answer at this address; if it is the right one, change `expect.gpu`",
        )
    elif expect.vram_mib is not None:
        yield from _vram(node, expect.vram_mib, gpus)
    driver = state.host.driver
    if expect.driver is not None and driver is not None and not _same_driver(expect.driver, driver):
        yield Finding(
            "driver-differs",
            Severity.INFO,
            node,
            f"the driver is {driver}, expected was {expect.driver}",
            "if the update was meant, change `expect.driver`",
        )


def gpu_name_matches(expected: str, found: str) -> bool:
    """``RTX 4090`` names an ``NVIDIA GeForce RTX 4090``; neither names an ``RTX 4090 D`` nor a ``Laptop GPU``."""
    wanted, there = expected.lower().split(), found.lower().split()
    return bool(wanted) and there[-len(wanted) :] == wanted


def _vram(node: str, expected: int, gpus: Sequence[GpuState]) -> Iterator[Finding]:
    """``vram_mib`` is of each GPU; who wrote down the sum of several meant the same."""
    if not vram_matches(expected, gpus):
        wrong = next(size for size in _sizes(gpus) if not _close(size, expected))
        yield Finding(
            "vram-differs",
            Severity.WARNING,
            node,
            f"the GPU has {wrong} MiB of memory, expected were {expected}",
            "a slice of a card (MIG, vGPU) or another model has less; if it is meant so, change `expect.vram_mib`",
        )


def vram_matches(expected: int, gpus: Sequence[GpuState]) -> bool:
    """True as well while the sizes are not known."""
    sizes = _sizes(gpus)
    return not sizes or _close(sum(sizes), expected) or all(_close(size, expected) for size in sizes)


def _sizes(gpus: Sequence[GpuState]) -> list[int]:
    return [gpu.memory_total_mib for gpu in gpus if gpu.memory_total_mib is not None]


def _close(found: int, expected: int) -> bool:
    return abs(found - expected) <= VRAM_TOLERANCE * expected


def _same_driver(expected: str, found: str) -> bool:
    return found == expected or found.startswith(expected.rstrip(".") + ".")


def describe_gpu_count(found: int, expected: int) -> str:
    """As a node's reason says it too, so that nobody reads it twice."""
    there = "1 GPU is" if found == 1 else f"{found} GPUs are"
    return f"{there} there, expected {'was' if expected == 1 else 'were'} {expected}"


def _names(gpus: Sequence[GpuState]) -> str:
    return ", ".join(sorted({gpu.name for gpu in gpus}))
