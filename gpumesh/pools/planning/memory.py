"""How much memory the layers of a model need, and how much of it each device may give.

After llama.cpp: src/llama-context.cpp (cells), src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp (windows),
src/llama-memory-recurrent.cpp, src/llama-model.cpp (``load_tensors``).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import DeviceOffer, HostOffer, ModelShape
from gpumesh.pools.planning.speed import LONGEST_DRAFT

MIB = 2**20
MICRO_BATCH_TOKENS = 512  # llama-server's default (-ub)
CELL_PADDING = 256
# The numbers of one block of a quantised type, and its bytes (ggml-common.h).
QUANTISED_KV_BLOCK = 32
KV_BLOCKS = {KvType.F16: (1, 2), KvType.Q8_0: (QUANTISED_KV_BLOCK, 34), KvType.Q4_0: (QUANTISED_KV_BLOCK, 18)}
# What is kept free of each GPU: the CUDA context of the program, with its kernels and work buffers, and a fiftieth of
# the memory for what else uses it. llama.cpp's own --fit leaves 1024 MiB; so does this on a GPU of 24 GB.
CUDA_CONTEXT_BYTES = 512 * MIB
GPU_RESERVE_PART = 1 / 50
CPU_RESERVE_BYTES = 32 * MIB  # the program itself


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a model: ``context`` tokens for each of ``parallel`` streams, and the probabilities behind
    ``outputs`` tokens of each stream at once (one, and one for each token of a draft)."""

    context: int
    parallel: int
    kv_type: KvType
    outputs: int = 1

    @classmethod
    def of(cls, spec: PoolSpec) -> Load:
        return cls(spec.context, spec.parallel, spec.kv_type, 1 if spec.draft is None else 1 + LONGEST_DRAFT)

    @property
    def cells(self) -> int:
        """The tokens that one stream's cache has room for: padded, as llama.cpp does."""
        total = _pad(self.context * self.parallel, CELL_PADDING)
        return _pad(total // self.parallel, CELL_PADDING)

    @property
    def batch(self) -> int:
        """The tokens that are computed at once at most."""
        return min(self.context * self.parallel, MICRO_BATCH_TOKENS)

    def window_cells(self, window: int) -> int:
        return _pad(min(self.cells, window + self.batch), CELL_PADDING)


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """The bytes of a layer's weights, and those of its keys, values and recurrent states."""

    weights: int
    kv: int

    @property
    def bytes(self) -> int:
        return self.weights + self.kv


def layer_needs(shape: ModelShape, load: Load) -> tuple[LayerNeed, ...]:
    """One for each block, and one for the output."""
    blocks = (LayerNeed(weights, layer_kv_bytes(shape, load, layer)) for layer, weights in enumerate(shape.layer_bytes))
    return (*blocks, LayerNeed(shape.output_bytes, 0))


def layer_kv_bytes(shape: ModelShape, load: Load, layer: int) -> int:
    """The bytes that block ``layer`` keeps for all streams."""
    cells = load.window_cells(shape.window or 0) if has_window(shape, layer) else load.cells
    block, block_bytes = KV_BLOCKS[load.kv_type]
    keys_and_values = shape.kv_elements[layer] * cells // block * block_bytes
    state = shape.state_bytes[layer] if layer < len(shape.state_bytes) else 0
    return (keys_and_values + state) * load.parallel


def can_quantise_cache(shape: ModelShape) -> bool:
    """llama.cpp refuses a quantised cache for heads that are not whole blocks."""
    return shape.head_size % QUANTISED_KV_BLOCK == 0


def shared_bytes(shape: ModelShape) -> int:
    """The token embeddings that the output uses too: they are in ``input_bytes`` and in ``output_bytes``."""
    return min(shape.input_bytes, shape.output_bytes) if shape.tied_output else 0


def has_window(shape: ModelShape, layer: int) -> bool:
    """Whether block ``layer`` looks back on a window only."""
    return layer < len(shape.window_layers) and shape.window_layers[layer]


@dataclass(frozen=True, slots=True)
class Slot:
    """A device of a node that can take layers. ``offered``: the bytes of it that the pool may use; ``draft``: those of
    them that the draft model needs."""

    node: str
    is_head: bool
    device: DeviceOffer
    offered: int
    draft: int = 0

    @property
    def for_layers(self) -> int:
        return self.offered - self.draft

    @property
    def is_gpu(self) -> bool:
        return self.device.index is not None

    @property
    def is_head_cpu(self) -> bool:
        return self.is_head and not self.is_gpu


def slots_of(offer: HostOffer, *, is_head: bool, unload: bool) -> tuple[Slot, ...]:
    """The devices of a host in the order of its programs: its GPUs, or its CPU if it has none."""
    gpus = tuple(device for device in offer.devices if device.index is not None)
    left = offer.limit_bytes
    slots = []
    for device in gpus or offer.devices:
        free = device.free_bytes + (device.held_by_others if unload else 0)
        if device.total_bytes is not None:
            free = min(free, device.total_bytes)
        if left is not None:
            free = min(free, left)
            left -= free
        slots.append(Slot(offer.node, is_head, device, max(0, free - reserve_bytes(device))))
    return tuple(slots)


def reserve_bytes(device: DeviceOffer) -> int:
    """What is kept free of a device beside the pool's buffers."""
    if device.index is None:
        return CPU_RESERVE_BYTES
    return CUDA_CONTEXT_BYTES + int((device.total_bytes or device.free_bytes) * GPU_RESERVE_PART)


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
