"""The list of tensors in a GGUF header: names, forms, types and places."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpumesh.pools.gguf.byte_reader import ByteReader
from gpumesh.pools.gguf.errors import GgufError
from gpumesh.pools.gguf.ggml_types import GGML_TYPES, GgmlType

# llama.cpp's limits: ggml.h (GGML_MAX_NAME, GGML_MAX_DIMS); no model has more than some 3,000 tensors.
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_TENSORS = 100_000
MAX_BYTES = 2**50


@dataclass(frozen=True, slots=True)
class Tensor:
    """``dimensions`` begin with the length of a row, as in ggml."""

    name: str
    dimensions: tuple[int, ...]
    type: GgmlType
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        return self.elements // self.type.block * self.type.block_bytes


def read_tensors(reader: ByteReader, count: int, *, alignment: int) -> tuple[tuple[Tensor, ...], int]:
    """Reads ``count`` tensors. Also returns the bytes of their data, with the gaps. Raises GgufError, EndOfData.

    llama.cpp loads only files whose tensors lie one behind the other in the order of this list (gguf.cpp).
    """
    if count > MAX_TENSORS:
        raise GgufError(f"it has {count} tensors")
    tensors: dict[str, Tensor] = {}
    end = 0
    for _ in range(count):
        tensor = _read_tensor(reader)
        if tensor.name in tensors:
            raise GgufError(f"it has the tensor {tensor.name!r} twice")
        if tensor.offset != end:
            raise GgufError(f"its tensor {tensor.name!r} is at {tensor.offset}, where {end} is right")
        tensors[tensor.name] = tensor
        end += -(-tensor.bytes // alignment) * alignment
        if end > MAX_BYTES:
            raise GgufError(f"its tensors would have more than {MAX_BYTES // 2**40} TiB")
    return tuple(tensors.values()), end


def _read_tensor(reader: ByteReader) -> Tensor:
    name = reader.string(MAX_NAME_BYTES)
    if name is None:
        raise GgufError(f"it has a tensor whose name is longer than {MAX_NAME_BYTES} bytes")
    count = reader.u32()
    if not 1 <= count <= MAX_DIMENSIONS:
        raise GgufError(f"its tensor {name!r} has {count} dimensions")
    dimensions = tuple(reader.u64() for _ in range(count))
    kind, offset = reader.u32(), reader.u64()
    ggml_type = GGML_TYPES.get(kind)
    if ggml_type is None:
        raise GgufError(f"its tensor {name!r} has numbers of the type {kind}, which gpumesh does not know")
    if any(not 1 <= dimension < MAX_BYTES for dimension in dimensions) or math.prod(dimensions) > MAX_BYTES:
        raise GgufError(f"its tensor {name!r} has the impossible form {' x '.join(map(str, dimensions))}")
    if dimensions[0] % ggml_type.block:
        raise GgufError(f"its tensor {name!r} has rows of {dimensions[0]} numbers, no multiple of {ggml_type.block}")
    return Tensor(name, dimensions, ggml_type, offset)
