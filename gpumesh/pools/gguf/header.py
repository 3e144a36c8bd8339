"""A model's shape from the first bytes of its GGUF file (llama.cpp's ggml/src/gguf.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.pools.base import ModelShape
from gpumesh.pools.gguf.byte_reader import MAX_HEADER_BYTES, ByteReader, EndOfData
from gpumesh.pools.gguf.errors import GgufError
from gpumesh.pools.gguf.metadata import read_metadata
from gpumesh.pools.gguf.model_shape import shape_of
from gpumesh.pools.gguf.tensors import read_tensors

__all__ = ["FIRST_READ_BYTES", "GgufError", "NeedsMore", "parse_header"]

FIRST_READ_BYTES = 2**20
MAGIC = b"GGUF"
OLD_MAGICS = (b"ggml", b"ggmf", b"ggjt", b"ggla", b"lmgg", b"fmgg", b"tjgg")
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20


@dataclass(frozen=True, slots=True)
class NeedsMore:
    """The header is longer than the bytes that were given. ``bytes``: how many to give next, from the file's start."""

    bytes: int


def parse_header(data: bytes, *, file_bytes: int | None = None) -> ModelShape | NeedsMore:
    """The shape of the model whose file starts with ``data``.

    Give FIRST_READ_BYTES first. After ``NeedsMore``, call again with so many bytes from the file's start (or with the
    whole file, if it is shorter). ``file_bytes``: the file's size, if it is known: a file that is cut short is refused.
    Raises GgufError.
    """
    try:
        return _parse(data, file_bytes)
    except EndOfData as end:
        if file_bytes is not None and (end.needed > file_bytes or len(data) >= file_bytes):
            raise GgufError(f"the file ends within its header, after {file_bytes} bytes") from None
        return NeedsMore(min(max(end.needed, 2 * len(data), FIRST_READ_BYTES), MAX_HEADER_BYTES))


def _parse(data: bytes, file_bytes: int | None) -> ModelShape:
    reader = ByteReader(data)
    _check_format(reader)
    tensor_count, key_count = reader.u64(), reader.u64()
    metadata = read_metadata(reader, key_count)
    alignment = metadata.count("general.alignment", most=MAX_ALIGNMENT)
    alignment = DEFAULT_ALIGNMENT if alignment is None else alignment
    if alignment == 0 or alignment & (alignment - 1):
        raise GgufError(f"its alignment, {alignment}, is no power of two")
    parts = metadata.count("split.count", most=2**16)
    if parts is not None and parts > 1:
        raise GgufError(
            f"it is one of {parts} files of a split model; join them with: llama-gguf-split --merge FIRST_FILE NEW_FILE"
        )
    tensors, tensor_bytes = read_tensors(reader, tensor_count, alignment=alignment)
    needed = -(-reader.position // alignment) * alignment + tensor_bytes
    # The last tensor's padding may be missing.
    if file_bytes is not None and file_bytes <= needed - alignment:
        raise GgufError(f"the file is cut short: it has {file_bytes} bytes of {needed}")
    return shape_of(metadata, tensors, file_bytes if file_bytes is not None else needed)


def _check_format(reader: ByteReader) -> None:
    magic = reader.take(4)
    if magic in OLD_MAGICS:
        raise GgufError("it is in the format that llama.cpp used before GGUF; convert the model again")
    if magic != MAGIC:
        raise GgufError("it is no GGUF file: it does not start with GGUF")
    version = reader.u32()
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise GgufError("it is a big-endian GGUF file, which llama.cpp loads on big-endian machines only")
        raise GgufError(f"it is a GGUF file of version {version}, and gpumesh knows 2 and 3")
