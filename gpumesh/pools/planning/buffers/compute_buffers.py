"""The compute buffers: what llama.cpp reserves on each device for the values between its operations.

Compared with the sizes that llama-server reports: tests/pools/planning/test_measured_buffers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.buffers.device_graph import (
    F16_BYTES,
    SMALLEST_ROTATION,
    DeviceGraph,
    Entry,
    GraphForm,
    GraphSizes,
)
from gpumesh.pools.planning.buffers.graph_memory import graph_bytes
from gpumesh.pools.planning.memory import Load

# Of blocks of one form that follow each other, so many decide, and of many changes of form, so many blocks in all.
SAME_BLOCKS = 3
MOST_BLOCKS = 12


@dataclass(frozen=True, slots=True)
class Place:
    """Which layers a device has: ``count`` of them, from layer ``first`` on (the output is the layer behind the last
    block). ``cpu_layers``: the number of layers on the head's CPU; they are the first ones."""

    first: int
    count: int
    cpu_layers: int = 0
    is_head_cpu: bool = False
    is_gpu: bool = False


def compute_bytes(shape: ModelShape, load: Load, place: Place) -> int:
    """The compute buffer of a device with these layers."""
    end = place.first + place.count
    last = min(end, shape.layers)
    windows = shape.window_layers or (False,) * shape.layers
    return _device_bytes(
        _graph_sizes(shape, load, is_gpu=place.is_gpu),
        GraphForm(
            windows=_shorten(windows[place.first : last]),
            masks=tuple(sorted(set(windows if place.is_head_cpu else windows[place.first : last]))),
            has_last_block=place.first < last == shape.layers,
            has_output=end > shape.layers,
            entry=_entry(shape, place),
            hands_over_sum=place.is_head_cpu and end < shape.layers,
            hands_over_norm=not place.is_head_cpu and place.cpu_layers > 0 and end < shape.layers,
        ),
    )


def _shorten(windows: Sequence[bool]) -> tuple[bool, ...]:
    """The same without blocks that need nothing new: each block uses the memory of those before it again."""
    short: list[bool] = []
    for number, is_windowed in enumerate(windows):
        if windows[max(0, number - SAME_BLOCKS) : number].count(is_windowed) < SAME_BLOCKS:
            short.append(is_windowed)
    return tuple(short if len(short) <= MOST_BLOCKS else [*short[: MOST_BLOCKS // 2], *short[-MOST_BLOCKS // 2 :]])


def _entry(shape: ModelShape, place: Place) -> Entry:
    if place.is_head_cpu:
        return Entry.TOKENS
    if place.first == shape.layers:
        return Entry.LAST_BLOCK
    if not place.cpu_layers:
        return Entry.BLOCK
    return Entry.PARTS_OF_SUM if place.first == place.cpu_layers else Entry.NORMED


def _graph_sizes(shape: ModelShape, load: Load, *, is_gpu: bool) -> GraphSizes:
    head_size = shape.head_size or shape.embedding // max(1, shape.heads)
    return GraphSizes(
        tokens=load.batch,
        outputs=min(load.batch, load.parallel * load.outputs),
        cells=load.cells,
        window_cells=load.window_cells(shape.window) if shape.window else 0,
        embedding=shape.embedding,
        queries=shape.heads * head_size,
        keys=shape.kv_heads * head_size,
        feed_forward=shape.feed_forward,
        experts=shape.experts,
        experts_used=shape.experts_used,
        vocabulary=shape.vocabulary,
        query_norm=shape.query_norm,
        rotation=_rotation_size(head_size) if load.kv_type is not KvType.F16 else 0,
        # A GPU's flash attention makes F16 of the keys and values of other types (ggml-cuda/fattn.cu).
        unpacked_cache=2 * F16_BYTES * load.cells * load.parallel * shape.kv_heads * head_size
        if is_gpu and load.kv_type is not KvType.F16
        else 0,
    )


def _rotation_size(head_size: int) -> int:
    """Keys of a quantised type are kept rotated, so many numbers at once; 0: they are not. It is the largest power of
    two, from 64 on, that divides the size of a head; for values it is 64 (src/llama-kv-cache.cpp)."""
    power = head_size & -head_size
    return power if power >= SMALLEST_ROTATION else 0


@lru_cache(maxsize=4096)
def _device_bytes(sizes: GraphSizes, form: GraphForm) -> int:
    needed = graph_bytes(DeviceGraph(sizes, form).build())
    if sizes.query_norm:  # Measured: sometimes as with this norm in place, and sometimes as with a place of its own.
        needed = max(needed, graph_bytes(DeviceGraph(sizes._replace(query_norm=False), form).build()))
    return needed
