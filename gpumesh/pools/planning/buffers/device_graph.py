"""The operations of one device for a full batch of tokens, as llama.cpp puts them together.

They are those of a usual block (llama.cpp's src/models/llama.cpp, src/llama-graph.cpp): norm, attention, norm, and the
feed-forward part or experts. What other architectures do beside that needs little or no further memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from gpumesh.pools.planning.buffers.graph_memory import Operation

NUMBER_BYTES = 4  # F32, and the places of tokens as I32
F16_BYTES = 2  # masks, with flash attention
ROW_INDEX_BYTES = 8
SMALLEST_ROTATION = 64


class Entry(Enum):
    """What the first operation of a device begins with.

    llama.cpp moves operations without weights to the device before or behind when layers are on the head's CPU, and not
    when all are on other devices (``graph_get_cb`` in src/llama-context.cpp).
    """

    TOKENS = auto()  # the head's CPU: the graph's inputs
    BLOCK = auto()  # the result of the block before
    LAST_BLOCK = auto()  # the result of the last block: only the rows of which the output is wanted
    PARTS_OF_SUM = auto()  # the last addition of the block before is here
    NORMED = auto()  # the first norm of the block is on the device before


class GraphForm(NamedTuple):
    """Which operations a device has.

    - ``windows``: for each block, whether it has a window.
    - ``masks``: which of the two masks are there: that of the whole context (False), that of the window (True).
    - ``hands_over_sum``: the last addition is on the next device.
    - ``hands_over_norm``: the first norm of the next block is here.
    """

    windows: tuple[bool, ...]
    masks: tuple[bool, ...]
    has_last_block: bool
    has_output: bool
    entry: Entry
    hands_over_sum: bool
    hands_over_norm: bool


class GraphSizes(NamedTuple):
    """What decides about the memory: numbers of tokens (``tokens`` are computed at once, the output of ``outputs`` is
    wanted), and for each token, how many numbers its values have."""

    tokens: int
    outputs: int
    cells: int
    window_cells: int
    embedding: int
    queries: int
    keys: int
    feed_forward: int
    experts: int
    experts_used: int
    vocabulary: int
    query_norm: bool
    rotation: int
    unpacked_cache: int


class DeviceGraph:
    """Lists the operations; call ``build`` once."""

    def __init__(self, sizes: GraphSizes, form: GraphForm) -> None:
        self._sizes = sizes
        self._form = form
        self._operations: list[Operation] = []
        self._masks: dict[bool, int] = {}

    def build(self) -> Sequence[Operation]:
        hidden, normed = self._begin()
        if not self._form.windows and not self._form.has_output:
            return self._operations
        for number, is_windowed in enumerate(self._form.windows):
            is_last = number == len(self._form.windows) - 1
            if number:
                normed = self._rows(self._sizes.embedding, hidden)
            hidden = self._block(
                hidden,
                normed,
                mask=self._masks[is_windowed],
                tokens=self._sizes.outputs if is_last and self._form.has_last_block else self._sizes.tokens,
                adds=not (is_last and self._form.hands_over_sum),
            )
        if self._form.has_output:
            outputs = self._sizes.outputs
            normed = self._rows(self._sizes.embedding, hidden, tokens=outputs)
            self._add(0, self._rows(self._sizes.vocabulary, normed, tokens=outputs))
        elif self._form.hands_over_norm:
            self._add(0, self._rows(self._sizes.embedding, hidden), hidden)
        else:
            self._add(0, hidden)
        return self._operations

    def _begin(self) -> tuple[int, int]:
        """What comes from other devices, which is copied first. Returns the first block's input, and its norm."""
        width, entry = self._sizes.embedding, self._form.entry
        if entry is Entry.LAST_BLOCK:
            return self._rows(width, tokens=self._sizes.outputs), 0
        if entry is Entry.TOKENS:
            self._rows(width)  # the place for embeddings as input, which is not used
            self._add_inputs()
            hidden = self._rows(width)
            if not self._form.windows:
                return hidden, hidden
        elif entry is Entry.PARTS_OF_SUM:
            fed, summed = self._rows(width), self._rows(width)
            self._add_inputs()
            hidden = self._rows(width, fed, summed, in_place=True)
        elif entry is Entry.NORMED:
            copied_norm = self._rows(width)
            self._add_inputs()
            hidden = self._rows(width)
            return hidden, self._rows(width, copied_norm, in_place=True)
        else:
            hidden = self._rows(width)
            self._add_inputs()
        return hidden, self._rows(self._sizes.embedding, hidden)

    def _add_inputs(self) -> None:
        sizes = self._sizes
        self._positions = self._add(sizes.tokens * NUMBER_BYTES)
        self._row_indexes = self._add(2 * sizes.tokens * ROW_INDEX_BYTES)
        self._rotation = self._add((sizes.rotation**2 + SMALLEST_ROTATION**2) * NUMBER_BYTES if sizes.rotation else 0)
        for is_windowed in self._form.masks:
            cells = sizes.window_cells if is_windowed else sizes.cells
            self._masks[is_windowed] = self._add(cells * sizes.tokens * F16_BYTES)

    def _block(self, hidden: int, normed: int, *, mask: int, tokens: int, adds: bool) -> int:
        """``tokens``: of how many tokens the result is wanted."""
        sizes = self._sizes
        attended = self._attention(normed, mask)
        residual = hidden
        if tokens < sizes.tokens:
            attended = self._rows(sizes.embedding, attended, tokens=tokens)
            residual = self._rows(sizes.embedding, residual, tokens=tokens)
        summed = self._rows(sizes.embedding, attended, residual, tokens=tokens, in_place=True)
        normed = self._rows(sizes.embedding, summed, tokens=tokens)
        fed = self._experts(normed, tokens) if sizes.experts else self._feed_forward(normed, tokens)
        if not adds:
            return self._add(0, fed, summed)
        return self._rows(sizes.embedding, fed, summed, tokens=tokens, in_place=True)

    def _attention(self, normed: int, mask: int) -> int:
        sizes = self._sizes
        queries = self._turned(self._placed(self._rows(sizes.queries, normed), sizes.queries), sizes.queries)
        values = self._turned(self._rows(sizes.keys, normed), sizes.keys)
        keys = self._turned(self._placed(self._rows(sizes.keys, normed), sizes.keys), sizes.keys)
        self._add(0, keys, self._row_indexes)
        self._add(0, values, self._row_indexes)
        mixed_bytes = sizes.queries * sizes.tokens * NUMBER_BYTES + sizes.unpacked_cache
        mixed = self._turned(self._add(mixed_bytes, queries, mask), sizes.queries)
        return self._rows(sizes.embedding, mixed)

    def _placed(self, rows: int, width: int) -> int:
        """Queries or keys, rotated by the place of their token. Measured: that does not overwrite its source, though
        ggml would allow it."""
        if self._sizes.query_norm:
            rows = self._rows(width, rows)
        return self._rows(width, rows, self._positions)

    def _turned(self, rows: int, width: int) -> int:
        return self._rows(width, rows, self._rotation) if self._sizes.rotation else rows

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
