"""How large a model would be with other quantisations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpumesh.pools.base import ModelShape
from gpumesh.pools.planning.memory import shared_bytes

# Bits per weight of Llama 3.1 8B (llama.cpp's tools/quantize/README.md), of what people publish most, from the best to
# the smallest.
BITS_PER_WEIGHT = {
    "Q8_0": 8.5008,
    "Q6_K": 6.5633,
    "Q5_K_M": 5.7036,
    "Q4_K_M": 4.8944,
    "IQ4_XS": 4.4597,
    "Q3_K_M": 3.996,
    "IQ3_XXS": 3.2548,
    "IQ2_M": 2.9294,
    "IQ2_XXS": 2.3824,
}
# Below this, answers become clearly worse: such a file is not called an alternative to a pool.
LOWEST_GOOD_BITS = 3.2
# A file counts as smaller only if it is so much smaller.
CLEARLY_SMALLER = 0.97


def bits_per_weight(shape: ModelShape) -> float:
    """The mean of all tensors of the file."""
    return 8 * (shape.weights_bytes - shared_bytes(shape)) / max(1, shape.parameters)


def smaller_shapes(shape: ModelShape, *, lowest_bits: float = 0.0) -> Iterator[tuple[str, ModelShape]]:
    """The model with each quantisation that is smaller than its own, with its name, from the best to the smallest."""
    bits = bits_per_weight(shape)
    for name, smaller_bits in BITS_PER_WEIGHT.items():
        if lowest_bits <= smaller_bits < bits * CLEARLY_SMALLER:
            yield name, _scaled(shape, name, smaller_bits / bits)


def _scaled(shape: ModelShape, file_type: str, factor: float) -> ModelShape:
    return replace(
        shape,
        file_type=file_type,
        layer_bytes=tuple(int(size * factor) for size in shape.layer_bytes),
        input_bytes=int(shape.input_bytes * factor),
        output_bytes=int(shape.output_bytes * factor),
        file_bytes=int(shape.file_bytes * factor),
    )
