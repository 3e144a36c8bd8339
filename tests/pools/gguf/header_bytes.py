"""Headers of GGUF files, written as llama.cpp describes the format, also wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
FORMS = {0: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
TYPE_F32, TYPE_Q8_0, TYPE_Q4_K = 0, 8, 12


@dataclass(frozen=True)
class TensorBytes:
    """A tensor in a header. ``offset``: behind the tensor before, if it is ``None``."""

    name: str
    dimensions: tuple[int, ...]
    type: int = TYPE_F32
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(content: object) -> bytes:
    """A value with its type before it."""
    match content:
        case bool():
            return struct.pack("<I?", BOOL, content)
        case int():
            return struct.pack("<IQ", U64, content) if content >= 2**32 else struct.pack("<II", U32, content)
        case float():
            return struct.pack("<If", F32, content)
        case str():
            return struct.pack("<I", STRING) + string(content)
        case list():
            return _list(content)
    raise TypeError(content)


def _list(members: list[str] | list[int]) -> bytes:
    kind = STRING if isinstance(members[0], str) else BOOL if isinstance(members[0], bool) else U32
    packed = (string(member) if isinstance(member, str) else struct.pack(FORMS[kind], member) for member in members)
    return struct.pack("<IIQ", ARRAY, kind, len(members)) + b"".join(packed)


def header(
    keys: Mapping[str, object] | Iterable[tuple[str, object]],
    tensors: Sequence[TensorBytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    pairs = list(keys.items() if isinstance(keys, Mapping) else keys)
    parts = [
        magic,
        struct.pack("<IQQ", version, len(tensors) if tensor_count is None else tensor_count, key_count or len(pairs)),
        *(string(key) + (content if isinstance(content, bytes) else value(content)) for key, content in pairs),
    ]
    offset = 0
    for tensor in tensors:
        parts.append(string(tensor.name) + struct.pack("<I", len(tensor.dimensions)))
        parts.append(struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions))
        parts.append(struct.pack("<IQ", tensor.type, offset if tensor.offset is None else tensor.offset))
        offset += padded_bytes(tensor)
    return b"".join(parts)


def padded_bytes(tensor: TensorBytes) -> int:
    elements = 1
    for dimension in tensor.dimensions:
        elements *= dimension
    size = {TYPE_F32: elements * 4, TYPE_Q8_0: elements // 32 * 34, TYPE_Q4_K: elements // 256 * 144}[tensor.type]
    return -(-size // 32) * 32


def keys_of(architecture: str, **numbers: object) -> dict[str, object]:
    """The keys of a model; ``attention_head_count=8`` stands for ``llama.attention.head_count``."""
    return {"general.architecture": architecture} | {
        f"{architecture}.{key.replace('__', '.')}": content for key, content in numbers.items()
    }


def llama_keys(**changes: object) -> dict[str, object]:
    """A small llama: 2 blocks of 64 numbers, 4 heads, 2 of them with keys."""
    numbers: dict[str, object] = {
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "context_length": 4096,
        "attention__head_count": 4,
        "attention__head_count_kv": 2,
    }
    return keys_of("llama", **(numbers | changes))


def block_tensors(layer: int, *parts: str) -> list[TensorBytes]:
    """Tensors of 64 x 64 numbers, 16 KiB each."""
    names = parts or ("attn_q", "attn_k", "attn_v", "ffn_up")
    return [TensorBytes(f"blk.{layer}.{part}.weight", (64, 64)) for part in names]


def llama_tensors(layers: int = 2) -> list[TensorBytes]:
    blocks = [tensor for layer in range(layers) for tensor in block_tensors(layer)]
    return [TensorBytes("token_embd.weight", (64, 300)), *blocks, TensorBytes("output_norm.weight", (64,))]
