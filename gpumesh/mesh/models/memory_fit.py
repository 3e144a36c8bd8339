"""Estimates which sizes of model still fit into the fleet's free GPU memory, and on how many nodes. Pure.

A size needs the memory of its weights at Q4_K_M (4.85 bits each: llama.cpp's table of quantisations), the KV cache of
8192 tokens in 16 bits (2 x layers x KV heads x head size x 2 bytes for each token, from the models' own
configurations), and an allowance of 600 MiB for the CUDA context and the compute buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.state import BackendPhase, Health, MeshState, NodeState, free_mib


@dataclass(frozen=True, slots=True)
class Size:
    """A size by its usual name; the figures are those of the usual models of that size."""

    name: str
    need_mib: int


SIZES = (
    Size("70B", 44_000),  # Llama 3.3 70B: 70.6 G weights, 80 layers of 8 KV heads
    Size("32B", 21_700),  # Qwen2.5 32B: 32.8 G, 64 layers of 8
    Size("14B", 10_700),  # Qwen2.5 14B: 14.8 G, 48 layers of 8
    Size("8B", 6_300),  # Llama 3.1 8B: 8.0 G, 32 layers of 8
    Size("3B", 2_700),  # Qwen2.5 3B: 3.1 G, 36 layers of 2
    Size("1B", 1_600),  # Llama 3.2 1B: 1.2 G, 16 layers of 8
)


@dataclass(frozen=True, slots=True)
class Fit:
    size: str
    nodes: int


def find_largest_fits(state: MeshState) -> tuple[Fit, ...]:
    """The largest size that fits somewhere, and the largest that fits on more nodes than that. Empty when nothing is
    known of free memory; one Fit of no node when nothing fits."""
    free = _list_free_mib(state)
    if not free:
        return ()
    fits: list[Fit] = []
    for size in SIZES:
        count = sum(mib >= size.need_mib for mib in free)
        if count > (fits[-1].nodes if fits else 0):
            fits.append(Fit(size.name, count))
        if len(fits) == 2:
            break
    return tuple(fits) or (Fit(SIZES[-1].name, 0),)


def format_fits(fits: tuple[Fit, ...]) -> str | None:
    """``a 14B Q4 fits on 2 nodes``"""
    if not fits:
        return None
    first, *more = fits
    if not first.nodes:
        return "no model fits now"
    article = "an" if first.size.startswith("8") else "a"
    text = f"{article} {first.size} Q4 fits on {first.nodes} node{'' if first.nodes == 1 else 's'}"
    return text + "".join(f", {'an' if fit.size.startswith('8') else 'a'} {fit.size} on {fit.nodes}" for fit in more)


def _list_free_mib(state: MeshState) -> list[int]:
    """The free memory of each node that could load a model, in MiB: of all its GPUs together, because the server splits
    a model among them. A GPU that two nodes share counts for the first node."""
    seen: set[str] = set()
    free = []
    for node in state.nodes:
        if not _serves(node):
            continue
        gpus = [gpu for gpu in node.gpus or () if gpu.uuid not in seen]
        seen.update(gpu.uuid for gpu in gpus)
        known_mib = [mib for gpu in gpus if (mib := free_mib(gpu)) is not None]
        if known_mib:
            free.append(sum(known_mib))
    return free


def _serves(node: NodeState) -> bool:
    return node.health in (Health.HEALTHY, Health.DEGRADED) and node.backend.state is BackendPhase.UP
