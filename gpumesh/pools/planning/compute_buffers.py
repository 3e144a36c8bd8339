"""The compute buffers: what llama.cpp reserves on each device for the values between its operations.

The operations are those of a usual block (llama.cpp's src/models/llama.cpp, src/llama-graph.cpp): norm, attention,
norm, feed-forward part or experts. What other architectures do beside that needs little or no further memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.graph_memory import Operation, graph_bytes
from gpumesh.pools.planning.memory import Load

NUMBER_BYTES = 4  # F32, and the places of tokens as I32
MASK_BYTES = 2  # F16, with flash attention
ROW_INDEX_BYTES = 8
# The layers after the second one use the memory of the first two again.
DISTINCT_LAYERS = 2


def compute_bytes(shape: ModelShape, load: Load, first: int, count: int) -> int:
    """For a device with ``count`` layers from layer ``first`` on (the output is the layer behind the last block)."""
    last = min(first + count, shape.layers)
    windowed = sum(shape.window_layers[first:last])
    return _device_bytes(
        _Sizes.of(shape, load),
        full_layers=min(last - first - windowed, DISTINCT_LAYERS),
        window_layers=min(windowed, DISTINCT_LAYERS),
        has_last_block=last == shape.layers and last > first,
        has_output=first + count > shape.layers,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What decides about the buffers: numbers of a row for each token, and numbers of tokens."""

    tokens: int
    outputs: int
    streams: int
    cells: int
    window_cells: int
    embedding: int
    queries: int
    keys: int
    feed_forward: int
    experts: int
    experts_used: int
    vocabulary: int
    rotated_cache: bool

    @classmethod
    def of(cls, shape: ModelShape, load: Load) -> _Sizes:
        head_size = shape.head_size or shape.embedding // max(1, shape.heads)
        return cls(
            tokens=load.batch,
            outputs=min(load.batch, load.parallel),
            streams=load.parallel,
            cells=load.cells,
            window_cells=load.window_cells(shape.window) if shape.window else 0,
            embedding=shape.embedding,
            queries=shape.heads * head_size,
            keys=shape.kv_heads * head_size,
            feed_forward=shape.feed_forward,
            experts=shape.experts,
            experts_used=shape.experts_used,
            vocabulary=shape.vocabulary,
            rotated_cache=load.kv_type is not KvType.F16,
        )


@lru_cache(maxsize=4096)
def _device_bytes(
    sizes: _Sizes, full_layers: int, window_layers: int, *, has_last_block: bool, has_output: bool
) -> int:
    return graph_bytes(_Graph(sizes, full_layers, window_layers, has_last_block, has_output).build())


class _Graph:
    """The operations of one device for a full batch."""

    def __init__(
        self, sizes: _Sizes, full_layers: int, window_layers: int, has_last_block: bool, has_output: bool
    ) -> None:
        self._sizes = sizes
        self._windows = [False] * full_layers + [True] * window_layers
        self._has_last_block = has_last_block
        self._has_output = has_output
        self._operations: list[Operation] = []

    def build(self) -> Sequence[Operation]:
        sizes = self._sizes
        # What comes from other devices is copied first.
        hidden = self._rows(sizes.embedding)
        self._positions = self._add(sizes.tokens * NUMBER_BYTES)
        self._masks = {
            is_windowed: self._add((sizes.window_cells if is_windowed else sizes.cells) * sizes.tokens * MASK_BYTES)
            for is_windowed in sorted(set(self._windows))
        }
        self._row_indexes = self._add(2 * sizes.tokens * ROW_INDEX_BYTES)
        for number, is_windowed in enumerate(self._windows):
            is_last = self._has_last_block and number == len(self._windows) - 1
            hidden = self._block(hidden, is_windowed=is_windowed, is_last=is_last)
        if self._has_output:
            outputs = sizes.outputs
            normed = self._add(sizes.embedding * outputs * NUMBER_BYTES, hidden)
            logits = self._add(sizes.vocabulary * outputs * NUMBER_BYTES, normed)
            self._add(0, logits)
        else:
            self._add(0, hidden)
        return self._operations

    def _block(self, hidden: int, *, is_windowed: bool, is_last: bool) -> int:
        sizes = self._sizes
        normed = self._rows(sizes.embedding, hidden)
        attended = self._attention(normed, self._masks[is_windowed])
        residual = hidden
        tokens = sizes.tokens
        if is_last:
            tokens = sizes.outputs
            attended = self._rows(sizes.embedding, attended, tokens=tokens)
            residual = self._rows(sizes.embedding, residual, tokens=tokens)
        summed = self._rows(sizes.embedding, attended, residual, tokens=tokens, in_place=True)
        normed = self._rows(sizes.embedding, summed, tokens=tokens)
        fed = self._experts(normed, tokens) if sizes.experts else self._feed_forward(normed, tokens)
        return self._rows(sizes.embedding, fed, summed, tokens=tokens, in_place=True)

    def _attention(self, normed: int, mask: int) -> int:
        sizes = self._sizes
        queries = self._rotated(self._rows(sizes.queries, normed), sizes.queries)
        values = self._rows(sizes.keys, normed)
        keys = self._rotated(self._rows(sizes.keys, normed), sizes.keys)
        self._add(0, keys, self._row_indexes)
        self._add(0, values, self._row_indexes)
        mixed = self._rows(sizes.queries, queries, mask)
        return self._rows(sizes.embedding, mixed)

    def _rotated(self, rows: int, width: int) -> int:
        turned = self._rows(width, rows, self._positions, in_place=True)
        return self._rows(width, turned) if self._sizes.rotated_cache else turned

    def _feed_forward(self, normed: int, tokens: int) -> int:
        width = self._sizes.feed_forward
        gate = self._rows(width, normed, tokens=tokens)
        up = self._rows(width, normed, tokens=tokens)
        return self._rows(self._sizes.embedding, self._rows(width, gate, up, tokens=tokens), tokens=tokens)

    def _experts(self, normed: int, tokens: int) -> int:
        sizes = self._sizes
        used = tokens * sizes.experts_used
        rates = self._rows(
            sizes.experts, self._rows(sizes.experts, normed, tokens=tokens), tokens=tokens, in_place=True
        )
        chosen = self._rows(sizes.experts, rates, tokens=tokens)
        weights = self._rows(1, rates, chosen, tokens=used)
        gate = self._rows(sizes.feed_forward, normed, chosen, tokens=used)
        up = self._rows(sizes.feed_forward, normed, chosen, tokens=used)
        joined = self._rows(sizes.feed_forward, gate, up, tokens=used)
        results = self._rows(sizes.embedding, joined, chosen, tokens=used)
        weighted = self._rows(sizes.embedding, results, weights, tokens=used, in_place=True)
        return self._rows(sizes.embedding, weighted, tokens=tokens)

    def _rows(self, width: int, *sources: int, tokens: int | None = None, in_place: bool = False) -> int:
        """An operation whose result has ``width`` numbers for each token."""
        count = self._sizes.tokens if tokens is None else tokens
        return self._add(width * count * NUMBER_BYTES, *sources, in_place=in_place)

    def _add(self, size: int, *sources: int, in_place: bool = False) -> int:
        self._operations.append(Operation(size, sources, in_place))
        return len(self._operations) - 1
