"""The audit's rules about the GPUs that mesh.yaml expects. (Throttled and faulty GPUs: probes/gpu_problems.py.)

The rules compare number, name, memory and driver with the ``expect`` of mesh.yaml. A fault that shows without such a
comparison, for example heat, is found by a probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.state import Finding, GpuState, NodeState, Severity, TunnelPhase
from gpumesh.topology import NodeSpec

# The memory may differ by this share of the expected memory. Drivers reserve amounts that differ by some MiB; the next
# smaller card differs by far more.
VRAM_TOLERANCE = 0.02


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields the findings about the GPUs of a node whose tunnel is up and whose GPUs are known."""
    gpus, expect, node = state.gpus, spec.expect, spec.name
    if gpus is None or state.tunnel.state is not TunnelPhase.UP:
        return
    says_something_about_gpus = expect.gpus is not None or expect.gpu is not None or expect.vram_mib is not None
    gpu_expected = says_something_about_gpus and expect.gpus != 0  # ``gpus: 0`` says that there is none
    if gpu_expected and not gpus:
        expected_gpu = expect.gpu or "a GPU"
        yield Finding(
            "gpu-missing",
            Severity.ERROR,
            node,
            f"{expected_gpu} was expected, no GPU is there",
            "check that it is the right machine, and that its container was started with its GPUs (`--gpus all`)",
        )
        return  # without a GPU, there is nothing more to compare
    if expect.gpus is not None and len(gpus) != expect.gpus:
        yield Finding(
            "gpu-count",
            Severity.ERROR if len(gpus) < expect.gpus else Severity.INFO,  # more GPUs than expected do no harm
            node,
            describe_gpu_count(len(gpus), expect.gpus),
            "one may have fallen off the bus (`dmesg | grep -i nvrm`), or be kept from the container; "
            "if it is meant so, change `expect.gpus`",
        )
    other_gpus = [gpu for gpu in gpus if expect.gpu is not None and not gpu_name_matches(expect.gpu, gpu.name)]
    if other_gpus:
        yield Finding(
            "gpu-differs",
            Severity.WARNING,
            node,
            f"{_join_names(other_gpus)} is there, expected was {expect.gpu}",
            "another machine may answer at this address; if it is the right one, change `expect.gpu`",
        )
    elif expect.vram_mib is not None:  # only for GPUs with the right name: another GPU has other memory anyhow
        yield from _check_vram(node, expect.vram_mib, gpus)
    driver = state.host.driver
    if expect.driver is not None and driver is not None and not driver_matches(expect.driver, driver):
        yield Finding(
            "driver-differs",
            Severity.INFO,
            node,
            f"the driver is {driver}, expected was {expect.driver}",
            "if the update was meant, change `expect.driver`",
        )


def gpu_name_matches(expected: str, found: str) -> bool:
    """Whether the GPU's name ``found`` ends with the words of ``expected``.

    ``RTX 4090`` matches ``NVIDIA GeForce RTX 4090``, but not ``RTX 4090 D`` nor ``RTX 4090 Laptop GPU``. Upper and
    lower case are the same. An ``expected`` without words matches no GPU.
    """
    expected_words, found_words = expected.lower().split(), found.lower().split()
    if not expected_words:
        return False
    last_words = found_words[-len(expected_words) :]
    return last_words == expected_words


def _check_vram(node: str, expected: int, gpus: Sequence[GpuState]) -> Iterator[Finding]:
    """Yields ``vram-differs`` if the GPUs' memory is not ``expected`` (MiB). The message has the first wrong size."""
    if not vram_matches(expected, gpus):
        # There is a wrong size: if all sizes were right, ``vram_matches`` would be true.
        wrong_size = next(size for size in _list_sizes(gpus) if not _is_close(size, expected))
        yield Finding(
            "vram-differs",
            Severity.WARNING,
            node,
            f"the GPU has {wrong_size} MiB of memory, expected were {expected}",
            "a slice of a card (MIG, vGPU) or another model has less; if it is meant so, change `expect.vram_mib`",
        )


def vram_matches(expected: int, gpus: Sequence[GpuState]) -> bool:
    """Whether each GPU, or all GPUs together, have ``expected`` MiB: a person may write either of them.

    Also true while the sizes are not known.
    """
    sizes = _list_sizes(gpus)
    if not sizes:
        return True
    sum_is_right = _is_close(sum(sizes), expected)
    each_is_right = all(_is_close(size, expected) for size in sizes)
    return sum_is_right or each_is_right


def _list_sizes(gpus: Sequence[GpuState]) -> list[int]:
    """The known memory sizes in MiB."""
    return [gpu.memory_total_mib for gpu in gpus if gpu.memory_total_mib is not None]


def _is_close(found: int, expected: int) -> bool:
    """Whether two memory sizes differ by no more than ``VRAM_TOLERANCE``."""
    return abs(found - expected) <= VRAM_TOLERANCE * expected


def driver_matches(expected: str, found: str) -> bool:
    """Whether the driver's version ``found`` is ``expected`` or begins with its numbers.

    ``550`` and ``550.54`` match the version ``550.54.15``; ``55`` does not.
    """
    return found == expected or found.startswith(expected.rstrip(".") + ".")


def describe_gpu_count(found: int, expected: int) -> str:
    """Returns a sentence about a wrong number of GPUs.

    The reason of a node's health uses the same sentence, so that a reader recognises the same fault.
    """
    gpus = "1 GPU is" if found == 1 else f"{found} GPUs are"
    return f"{gpus} there, expected {'was' if expected == 1 else 'were'} {expected}"


def _join_names(gpus: Sequence[GpuState]) -> str:
    """The names of the GPUs as one text, each name once."""
    return ", ".join(sorted({gpu.name for gpu in gpus}))
