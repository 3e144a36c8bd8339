"""Estimates which sizes of model still fit into the fleet's free GPU memory, and on how many nodes. Pure.

The estimate for a size is the sum of three parts: the weights at Q4_K_M (4.85 bits each, by llama.cpp's table of
quantisations); the KV cache of 8192 tokens in 16 bits (2 x layers x KV heads x head size x 2 bytes for each token, by
the models' own configurations); and 600 MiB for the CUDA context and the compute buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.state import BackendPhase, MeshState, NodeState, free_mib


@dataclass(frozen=True, slots=True)
class Size:
    """A size of models by its usual name, and the GPU memory that a model of this size needs."""

    name: str
    need_mib: int


SIZES = (
    # In each comment: the model, its 10^9 weights, its layers and the KV heads of a layer.
    Size("70B", 44_000),  # Llama 3.3 70B: 70.6 G weights, 80 layers of 8 KV heads
    Size("32B", 21_700),  # Qwen2.5 32B: 32.8 G, 64 layers of 8
    Size("14B", 10_700),  # Qwen2.5 14B: 14.8 G, 48 layers of 8
    Size("8B", 6_300),  # Llama 3.1 8B: 8.0 G, 32 layers of 8
    Size("3B", 2_700),  # Qwen2.5 3B: 3.1 G, 36 layers of 2
    Size("1B", 1_600),  # Llama 3.2 1B: 1.2 G, 16 layers of 8
)


@dataclass(frozen=True, slots=True)
class Fit:
    """A size of model, and the number of nodes on which it fits."""

    size: str
    nodes: int


def find_largest_fits(state: MeshState) -> tuple[Fit, ...]:
    """The largest size that fits on any node, and after it the largest size that fits on more nodes than the first one
    (left out if no size does). Empty if no node's free memory is known. One ``Fit`` with 0 nodes if no size fits.

    Example: 14B fits on 1 node, 8B on 1 node, 3B on 4 nodes: the fits are 14B on 1 node and 3B on 4 nodes."""
    free_mib_by_node = _list_free_mib(state)
    if not free_mib_by_node:
        return ()
    fits: list[Fit] = []
    most_nodes = 0
    for size in SIZES:  # the largest first
        count = sum(free >= size.need_mib for free in free_mib_by_node)
        if count > most_nodes:
            fits.append(Fit(size.name, count))
            most_nodes = count
        if len(fits) == 2:
            break
    return tuple(fits) or (Fit(SIZES[-1].name, 0),)


def format_fits(fits: tuple[Fit, ...]) -> str | None:
    """A text such as ``a 14B Q4 fits on 2 nodes``; ``None`` if ``fits`` is empty."""
    if not fits:
        return None
    first, *more = fits
    if not first.nodes:
        return "no model fits now"
    text = f"{_with_article(first.size)} Q4 fits on {first.nodes} node{'' if first.nodes == 1 else 's'}"
    return text + "".join(f", {_with_article(fit.size)} on {fit.nodes}" for fit in more)


def _with_article(size: str) -> str:
    """The size with the article that its spoken form needs: "an 8B" (eight), "a 14B" (fourteen)."""
    return f"an {size}" if size.startswith("8") else f"a {size}"


def _list_free_mib(state: MeshState) -> list[int]:
    """The free GPU memory of each node that could load a model, in MiB. It is the sum over the node's GPUs, because the
    server splits a model among them. A GPU that two nodes share counts for the first node only."""
    counted_uuids: set[str] = set()
    free_mib_by_node: list[int] = []
    for node in state.nodes:
        if not _serves(node):
            continue
        gpus = [gpu for gpu in node.gpus or () if gpu.uuid not in counted_uuids]
        counted_uuids.update(gpu.uuid for gpu in gpus)
        free_mib_by_gpu = [free_mib(gpu) for gpu in gpus]
        known_mib = [free for free in free_mib_by_gpu if free is not None]
        if known_mib:
            free_mib_by_node.append(sum(known_mib))
    return free_mib_by_node


def _serves(node: NodeState) -> bool:
    """Whether the node takes requests now."""
    return node.health.is_serving and node.backend.state is BackendPhase.UP
