"""Prints that other processes make too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.prefixes import SharedPromptHasher
from gpumesh.balancer.prefixes.prints import FIRST_BLOCK_BYTES

T = TypeVar("T")
SECRET = b"secret of a test"
KEY = ResidencyKey("m:latest", 8192, (("num_gpu", 99),))
TEXT = bytes(range(256)) * 40


def finish(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


@given(st.binary(max_size=3 * FIRST_BLOCK_BYTES), st.integers(0, 3 * FIRST_BLOCK_BYTES))
def test_a_print_in_steps_is_the_print_in_one_step(text: bytes, cut: int) -> None:
    hasher = SharedPromptHasher(SECRET)
    assert finish(hasher.hash_pieces(KEY, [text[:cut], text[cut:]])) == hasher.hash_prompt(KEY, text)


def test_the_beginning_of_a_prompt_and_its_key_and_the_secret_make_its_blocks() -> None:
    hasher = SharedPromptHasher(SECRET)
    whole, beginning = hasher.hash_prompt(KEY, TEXT), hasher.hash_prompt(KEY, TEXT[:2048] + b"x" * 2048)
    assert whole is not None
    assert beginning is not None
    assert whole.blocks[:4] == beginning.blocks[:4]
    assert not set(whole.blocks[4:]) & set(beginning.blocks[4:])
    other_key = hasher.hash_prompt(KEY._replace(context=4096), TEXT)
    hasher.replace_secret(b"another secret, of 16 bytes")
    other_secret = hasher.hash_prompt(KEY, TEXT)
    assert other_key is not None
    assert other_secret is not None
    assert not set(whole.blocks) & {*other_key.blocks, *other_secret.blocks}


def test_another_process_makes_the_same_print() -> None:
    program = (
        "from tests.balancer.prefixes.test_shared_prints import KEY, SECRET, TEXT, SharedPromptHasher; "
        "print(SharedPromptHasher(SECRET).hash_prompt(KEY, TEXT).blocks)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own = SharedPromptHasher(SECRET).hash_prompt(KEY, TEXT)
    assert own is not None
    assert done.stdout.strip() == str(own.blocks)
