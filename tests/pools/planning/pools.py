"""Models, hosts and pools for tests of planning."""

from __future__ import annotations

from typing import Any

from gpumesh.pool_spec import PoolMember, PoolSpec
from gpumesh.pools.base import DeviceOffer, HostOffer, ModelShape, PathKind, WorkerPath

MIB, GIB = 2**20, 2**30
RTX_4090 = "NVIDIA GeForce RTX 4090"
RTX_4090_BYTES_PER_S = 1008e9
F16, F32 = 2, 4
WINDOW_PERIOD = 6  # of gemma3


def llama_70b(**changes: Any) -> ModelShape:
    """Llama 3.3 70B as Q4_K_M: some 40 GiB."""
    fields: dict[str, Any] = {
        "architecture": "llama",
        "name": "Llama 3.3 70B",
        "file_type": "Q4_K_M",
        "layer_bytes": (510 * MIB,) * 80,
        "input_bytes": 563 * MIB,
        "output_bytes": 822 * MIB,
        "kv_elements": (2 * 8 * 128,) * 80,
        "embedding": 8192,
        "vocabulary": 128256,
        "heads": 64,
        "trained_context": 131072,
        "parameters": 70_553_706_560,
        "file_bytes": 42_185 * MIB,
        "head_size": 128,
        "kv_heads": 8,
        "feed_forward": 28672,
    }
    return ModelShape(**(fields | changes))


def small_model(layers: int = 10, layer_mib: int = 100, **changes: Any) -> ModelShape:
    """A model of some MiB with small buffers: the layers decide."""
    fields: dict[str, Any] = {
        "layer_bytes": (layer_mib * MIB,) * layers,
        "kv_elements": (64,) * layers,
        "input_bytes": MIB,
        "output_bytes": MIB,
        "embedding": 64,
        "vocabulary": 300,
        "heads": 4,
        "head_size": 16,
        "kv_heads": 2,
        "feed_forward": 128,
        "trained_context": 131072,
        "parameters": layers * layer_mib * MIB // 2,
        "file_bytes": (layers * layer_mib + 2) * MIB,
    }
    return llama_70b(**(fields | changes))


def llama_f16(
    *,
    layers: int = 8,
    embedding: int = 512,
    heads: int = 8,
    kv_heads: int = 2,
    head_size: int | None = None,
    feed_forward: int = 1536,
    vocabulary: int = 4000,
    experts: int = 0,
    experts_used: int = 0,
    query_norm: bool = False,
    windows: int | None = None,
    tied: bool = False,
) -> ModelShape:
    """A model of F16 matrices and F32 norms."""
    size = head_size or embedding // heads
    attention = embedding * size * (2 * heads + 2 * kv_heads) * F16
    feeding = 3 * embedding * feed_forward * max(1, experts) * F16 + experts * embedding * F32
    norms = (4 if windows else 2) * embedding * F32 + (2 * size * F32 if windows or query_norm else 0)
    embeddings = vocabulary * embedding * F16
    return small_model(
        layers,
        layer_bytes=(attention + feeding + norms,) * layers,
        input_bytes=embeddings,
        output_bytes=embeddings + embedding * F32,
        kv_elements=(2 * kv_heads * size,) * layers,
        embedding=embedding,
        vocabulary=vocabulary,
        heads=heads,
        head_size=size,
        kv_heads=kv_heads,
        feed_forward=feed_forward,
        experts=experts,
        experts_used=experts_used,
        query_norm=query_norm or windows is not None,
        tied_output=tied,
        window=windows,
        window_layers=tuple(layer % WINDOW_PERIOD != WINDOW_PERIOD - 1 for layer in range(layers)) if windows else (),
    )


def gpu(free_mib: int = 24000, *, index: int = 0, total_mib: int = 24564, **fields: Any) -> DeviceOffer:
    return DeviceOffer(
        RTX_4090, index, total_mib * MIB, free_mib * MIB, **({"bytes_per_s": RTX_4090_BYTES_PER_S} | fields)
    )


def cpu(free_mib: int, bytes_per_s: float | None = 40e9) -> DeviceOffer:
    return DeviceOffer("CPU", None, None, free_mib * MIB, bytes_per_s)


def host(node: str, *devices: DeviceOffer, limit_mib: int | None = None) -> HostOffer:
    return HostOffer(node, devices or (gpu(),), None if limit_mib is None else limit_mib * MIB)


def pool(*nodes: str, **fields: Any) -> PoolSpec:
    """A pool whose head is the first node."""
    return PoolSpec("big", "/models/big.gguf", tuple(PoolMember(node) for node in nodes), nodes[0], **fields)


def paths(**rtt_ms: float | None) -> dict[str, WorkerPath]:
    return {node: WorkerPath(PathKind.HEAD_TO_WORKER, rtt, 100e6) for node, rtt in rtt_ms.items()}
