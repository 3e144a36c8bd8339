"""A header gives the model's shape, bit by bit, and hostile bytes give an error within bounded time and memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.pools.base import ModelShape
from gpumesh.pools.gguf.byte_reader import MAX_HEADER_BYTES
from gpumesh.pools.gguf.header import FIRST_READ_BYTES, GgufError, NeedsMore, parse_header
from tests.pools.gguf.header_bytes import (
    ARRAY,
    STRING,
    TYPE_Q4_K,
    TYPE_Q8_0,
    U32,
    TensorBytes,
    block_tensors,
    header,
    llama_keys,
    llama_tensors,
    string,
)
from tests.real.tiny_model import write_tiny_model

BLOCK_BYTES = 64 * 64 * 4


def shape_of(data: bytes) -> ModelShape:
    shape = parse_header(data)
    assert isinstance(shape, ModelShape)
    return shape


def test_a_header_says_what_the_model_is_made_of() -> None:
    keys = llama_keys() | {"general.name": "Small one", "general.file_type": 15}
    shape = shape_of(header(keys, llama_tensors()))
    assert (shape.architecture, shape.name, shape.file_type) == ("llama", "Small one", "Q4_K_M")
    assert shape.layer_bytes == (4 * BLOCK_BYTES,) * 2
    assert shape.kv_elements == (2 * 16 * 2,) * 2
    assert (shape.embedding, shape.heads, shape.kv_heads, shape.head_size) == (64, 4, 2, 16)
    assert (shape.vocabulary, shape.trained_context, shape.feed_forward) == (300, 4096, 128)
    assert shape.parameters == 64 * 300 + 8 * 64 * 64 + 64
    assert not shape.obstacles


def test_token_embeddings_count_twice_if_the_output_uses_them() -> None:
    tied = shape_of(header(llama_keys(), llama_tensors()))
    assert (tied.input_bytes, tied.output_bytes, tied.tied_output) == (300 * 64 * 4, 300 * 64 * 4 + 64 * 4, True)
    own = shape_of(header(llama_keys(), [*llama_tensors(), TensorBytes("output.weight", (64, 300), TYPE_Q8_0)]))
    assert (own.output_bytes, own.tied_output) == (300 * 64 // 32 * 34 + 64 * 4, False)


def test_quantised_tensors_have_the_size_of_their_blocks() -> None:
    tensors = [TensorBytes("token_embd.weight", (256, 10)), TensorBytes("blk.0.attn_k.weight", (256, 3), TYPE_Q4_K)]
    assert shape_of(header(llama_keys(block_count=1), tensors)).layer_bytes == (3 * 144,)


def test_the_real_writers_file_is_understood(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=2, dim=32)
    data = path.read_bytes()
    shape = parse_header(data, file_bytes=len(data))
    assert isinstance(shape, ModelShape)
    assert shape.weights_bytes <= len(data) < shape.weights_bytes + 20_000
    assert (shape.layers, shape.vocabulary, shape.embedding) == (2, 259, 32)


@given(st.data())
def test_a_part_of_a_header_needs_more_and_never_less_than_before(data: st.DataObject) -> None:
    whole = header(llama_keys() | {"tokenizer.ggml.tokens": ["a", "bc", "<0x00>"]}, llama_tensors())
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    answer = parse_header(part)
    assert isinstance(answer, NeedsMore)
    assert answer.bytes >= FIRST_READ_BYTES
    assert parse_header(whole + b"\0" * 100) == parse_header(whole)


def test_a_list_of_strings_says_how_much_it_needs_at_least() -> None:
    tokens = struct.pack("<IIQ", ARRAY, STRING, 1_000_000) + string("x") * 200_000
    data = header(llama_keys() | {"tokenizer.ggml.tokens": tokens})
    answer = parse_header(data[:1_000_000])
    assert isinstance(answer, NeedsMore)
    assert 8_000_000 < answer.bytes < 9_000_000  # a million strings, none of them shorter than its length


WRONG = {
    "not GGUF": (header(llama_keys(), magic=b"PK\3\4"), "does not start with GGUF"),
    "an old format": (header(llama_keys(), magic=b"tjgg"), "before GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (header(llama_keys(), version=1), "version 1"),
    "endless tensors": (header(llama_keys(), tensor_count=2**63), f"{2**63} tensors"),
    "endless keys": (header(llama_keys(), key_count=2**63), f"{2**63} keys"),
    "an endless text": (header({"a": struct.pack("<IQ", STRING, 2**63)}), "longer than 64 MiB"),
    "an endless key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "longer than 64 MiB"),
    "endless numbers": (header({"a": struct.pack("<IIQ", ARRAY, U32, 2**63)}), "longer than 64 MiB"),
    "endless texts": (header({"a": struct.pack("<IIQ", ARRAY, STRING, 2**63)}), "a list of"),
    "a tokenizer of 100 MB": (
        header({"a": struct.pack("<IIQQ", ARRAY, STRING, 1, 100_000_000)}),
        "longer than 64 MiB",
    ),
    "lists of lists": (header({"a": struct.pack("<IIQ", ARRAY, ARRAY, 1)}), "a list of lists"),
    "an unknown type": (header({"a": struct.pack("<I", 99)}), "unknown type 99"),
    "a key twice": (header([("a", 1), ("a", 2)]), "key 'a' twice"),
    "no architecture": (header({"general.name": "x"}), "architecture"),
    "an architecture for a terminal": (header({"general.architecture": "\x1b[2J"}), "architecture"),
    "no layers": (header(llama_keys(block_count=0)), "block_count"),
    "too many layers": (header(llama_keys(block_count=2**31)), "block_count"),
    "layers as text": (header(llama_keys(block_count="two")), "block_count"),
    "an alignment of 3": (header({"general.alignment": 3}), "power of two"),
    "a split model": (header({"split.count": 4}), "one of 4 files"),
    "a tensor twice": (header(llama_keys(), block_tensors(0, "attn_k", "attn_k")), "twice"),
    "a tensor elsewhere": (header(llama_keys(), [TensorBytes("a", (4,), offset=2**60)]), "where 0 is right"),
    "a tensor of no block": (header(llama_keys(), block_tensors(7)), "that it does not have"),
    "a tensor with 9 dimensions": (header(llama_keys(), [TensorBytes("a", (1,) * 9)]), "9 dimensions"),
    "a tensor of nothing": (header(llama_keys(), [TensorBytes("a", (0, 4))]), "impossible form"),
    "a huge tensor": (header(llama_keys(), [TensorBytes("a", (2**40, 2**40))]), "impossible form"),
    "a broken row": (header(llama_keys(), [TensorBytes("a", (33,), TYPE_Q8_0)]), "no multiple of 32"),
    "a long name": (header(llama_keys(), [TensorBytes("a" * 64, (4,))]), "longer than 63"),
    "heads for too few layers": (header(llama_keys(attention__head_count_kv=[2])), "1 values for 2 layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_headers_are_refused_with_a_reason(case: str) -> None:
    data, reason = WRONG[case]
    with pytest.raises(GgufError, match=reason) as raised:
        parse_header(data)
    assert str(raised.value).isprintable()


def test_an_unknown_number_type_is_named() -> None:
    data = header(llama_keys(), [TensorBytes("a", (4,))])
    with pytest.raises(GgufError, match="type 77"):
        parse_header(data[:-12] + struct.pack("<IQ", 77, 0))


def test_a_file_that_is_cut_short_is_refused() -> None:
    data = header(llama_keys(), llama_tensors())
    whole = shape_of(data).file_bytes
    assert isinstance(parse_header(data, file_bytes=whole), ModelShape)
    with pytest.raises(GgufError, match="cut short"):
        parse_header(data, file_bytes=whole - 5000)
    with pytest.raises(GgufError, match="ends within its header"):
        parse_header(data[:-10], file_bytes=len(data) - 10)


@given(st.binary(max_size=400))
def test_any_bytes_give_an_answer_or_an_error(data: bytes) -> None:
    parse_or_error(b"GGUF" + struct.pack("<I", 3) + data)


@given(st.data())
def test_a_header_with_changed_bytes_gives_an_answer_or_an_error(data: st.DataObject) -> None:
    changed = bytearray(header(llama_keys() | {"tokenizer.ggml.tokens": ["a", "b"]}, llama_tensors()))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    parse_or_error(bytes(changed))


def parse_or_error(data: bytes) -> None:
    try:
        answer = parse_header(data)
    except GgufError as error:
        assert str(error).isprintable()
        return
    if isinstance(answer, NeedsMore):
        assert len(data) < answer.bytes <= MAX_HEADER_BYTES
    else:
        assert answer.name is None or answer.name.isprintable()


def test_a_tokenizer_is_skipped_without_copies() -> None:
    tokens = struct.pack("<IIQ", ARRAY, STRING, 20_000) + string("x" * 100) * 20_000
    data = header(llama_keys() | {"tokenizer.ggml.tokens": tokens}, llama_tensors())
    tracemalloc.start()
    try:
        assert isinstance(parse_header(data), ModelShape)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000 < len(data)
