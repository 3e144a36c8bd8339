"""The compute buffers: what llama.cpp reserves on each device for the values between its operations."""

from __future__ import annotations

from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.memory import Load

F32_BYTES = 4
F16_BYTES = 2


def compute_bytes(shape: ModelShape, load: Load, *, has_output: bool) -> int:
    """The largest sum of the values that are alive at once, for a full batch."""
    tokens = load.batch
    row = shape.embedding * tokens * F32_BYTES
    mask = load.cells * load.parallel * F16_BYTES * tokens
    wide = shape.feed_forward * max(1, shape.experts_used) * tokens * F32_BYTES
    feed_forward = 2 * row + 2 * wide
    output = row + shape.vocabulary * tokens * F32_BYTES if has_output else 0
    return mask + max(feed_forward, output)
