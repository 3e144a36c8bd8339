from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.balancer.prefixes.prints import (
    BLOCK_ENDS,
    STEP_BYTES,
    PromptHasher,
    PromptPrint,
    count_blocks,
    print_from_ids,
)

T = TypeVar("T")
HASHER = PromptHasher(b"secret of a test")


def finish(steps: Generator[None, None, T]) -> tuple[T, int]:
    """The result, and the number of steps before it."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result, count
        count += 1


def make_text(size: int, seed: int = 0) -> bytes:
    return b"".join(b"%07d\n" % (number + seed) for number in range(size // 8 + 1))[:size]


def make_print(text: bytes, key: object = "m") -> PromptPrint:
    prompt = HASHER.hash_prompt(key, text)
    assert prompt is not None
    return prompt


def count_equal(first: PromptPrint, second: PromptPrint) -> int:
    """The number of equal blocks at the beginning; no block after these is equal."""
    pairs = list(zip(first.blocks, second.blocks, strict=False))
    equal = sum(a == b for a, b in pairs)
    assert all(a == b for a, b in pairs[:equal])
    return equal


def test_the_blocks_grow_so_that_a_long_prompt_has_few() -> None:
    assert BLOCK_ENDS[:3] == (512, 1024, 1536)
    assert BLOCK_ENDS[63:66] == (32 << 10, 34 << 10, 36 << 10)
    assert list(BLOCK_ENDS) == sorted(set(BLOCK_ENDS))
    assert count_blocks(4096) == 8
    assert count_blocks(1 << 20) == 203
    assert count_blocks(1 << 40) == len(BLOCK_ENDS) == 320


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_prompt_without_a_whole_block_has_no_print(size: int) -> None:
    assert HASHER.hash_prompt("m", b"x" * size) is None
    assert finish(HASHER.hash_pieces("m", [b"x" * size]))[0] is None


@given(size=st.integers(512, 100_000), more=st.integers(0, 100_000))
def test_a_longer_prompt_has_the_same_first_blocks(size: int, more: int) -> None:
    text = make_text(size + more)
    short, long = make_print(text[:size]), make_print(text)
    assert (len(short.blocks), short.size) == (count_blocks(size), size)
    assert long.blocks[: len(short.blocks)] == short.blocks


@given(size=st.integers(512, 100_000), data=st.data())
def test_blocks_are_equal_up_to_the_first_byte_that_differs(size: int, data: st.DataObject) -> None:
    text = make_text(size)
    position = data.draw(st.integers(0, size - 1))
    changed = text[:position] + b"\xff" + text[position + 1 :]
    assert count_equal(make_print(text), make_print(changed)) == bisect_right(BLOCK_ENDS, position)


def test_a_block_in_another_place_is_another_block() -> None:
    blocks = make_print(b"x" * 4096).blocks
    assert len(set(blocks)) == 8


def test_the_residency_key_and_the_secret_belong_to_each_block() -> None:
    text = make_text(4096)
    other = PromptHasher(b"secret of another test").hash_prompt("m", text)
    assert other is not None
    assert count_equal(make_print(text), other) == 0
    assert count_equal(make_print(text), make_print(text, ("m", 8192))) == 0
    assert make_print(text, ("m", 8192)) == make_print(text, ("m", 8192))


def test_a_secret_is_long_and_is_not_shown() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        PromptHasher(b"short")
    assert "secret" not in repr(HASHER)
    assert HASHER.hash_text(b"bob") == HASHER.hash_text(b"bob") != hash(b"bob")


@given(st.lists(st.integers(0, 3 * STEP_BYTES), max_size=6))
@example([0, 0])
@example([12 << 20, 5])
def test_pieces_have_the_print_of_the_joined_pieces(sizes: list[int]) -> None:
    pieces = [make_text(size, seed=number) for number, size in enumerate(sizes)]
    prompt, steps = finish(HASHER.hash_pieces("m", [memoryview(piece) for piece in pieces]))
    assert prompt == HASHER.hash_prompt("m", b"".join(pieces))
    assert steps == sum(-(-size // STEP_BYTES) for size in sizes)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_ids_of_a_trace_are_equal_as_their_text_is(first: list[int], second: list[int]) -> None:
    equal_ids = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if equal_ids is None:
        equal_ids = min(len(first), len(second))
    prints = [print_from_ids(ids, id_bytes=2048, size=2048 * len(ids)) for ids in (first, second)]
    assert prints[0] is not None
    assert prints[1] is not None
    assert prints[0].size == 2048 * len(first)
    assert count_equal(prints[0], prints[1]) == count_blocks(2048 * equal_ids)


def test_a_trace_without_ids_or_with_a_short_prompt_has_no_print() -> None:
    assert print_from_ids([], id_bytes=2048, size=5000) is None
    assert print_from_ids([1], id_bytes=2048, size=100) is None
