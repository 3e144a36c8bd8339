"""``PromptPrint``: the hashes of a prompt's blocks, which show how far two prompts are equal. Pure.

The hash of a block covers all bytes of the prompt up to the block's end, and the residency key. So two prompts with an
equal hash at one block are equal up to the end of that block.

**The blocks grow with their position**, so that a long prompt has few: the first 64 blocks have 512 bytes each (about
128 tokens), the next 64 have 2 KiB, the next 8 KiB, and so on. The ends of the blocks depend only on their position: so
a prompt and a longer prompt that begins with it have the same first blocks. A prompt of 1 MiB has 203 blocks. The part
of a prompt after the last end in ``BLOCK_ENDS`` (10.7 MiB) belongs to no block: no model reads a prompt of that length.

**The hash** is Python's own ``hash()`` of bytes: SipHash-1-3, to which a secret of 16 bytes or more is fed before each
block. It takes less than half of the time of BLAKE2b (``benchmarks/decisions.py prefixes``). Without the secret, it is
not possible to find two texts with an equal hash, or to test a guess of a text. In addition, Python's hash has a random
key in each process, unless ``PYTHONHASHSEED`` is set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Hashable, Sequence
from itertools import accumulate, chain

import msgspec

FIRST_BLOCK_BYTES = 512
GROWTH = 4  # the blocks of each size are larger by this factor than the blocks of the size before
BLOCKS_OF_SIZE = 64
SIZES = 5
BLOCK_ENDS: tuple[int, ...] = tuple(
    accumulate(chain.from_iterable([FIRST_BLOCK_BYTES * GROWTH**size] * BLOCKS_OF_SIZE for size in range(SIZES)))
)
"""The end of each block, in bytes from the prompt's beginning."""

MIN_SECRET_BYTES = 16
STEP_BYTES = 64 << 10  # bytes that are hashed in one step: about 30 us

Piece = bytes | memoryview | msgspec.Raw
"""A part of a prompt, as it is written in a request's body."""


class PromptPrint(msgspec.Struct, frozen=True, gc=False):
    """A prompt as the balancer knows it.

    ``blocks`` are the hashes of its whole blocks, in their order; there is at least one. ``size`` is the length of the
    prompt in bytes, with the part after the last whole block.
    """

    blocks: tuple[int, ...]
    size: int


def count_blocks(size: int) -> int:
    """How many whole blocks a prompt of ``size`` bytes has."""
    return bisect_right(BLOCK_ENDS, size)


class PromptHasher:
    """Makes the prints of prompts. Prints of two hashers cannot be compared, except those of ``shared_prints.py``."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        """``secret``: random bytes of this process, at least ``MIN_SECRET_BYTES``. Raises ValueError for fewer."""
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has at least {MIN_SECRET_BYTES} bytes")
        self._secret = secret

    def __repr__(self) -> str:
        return "<PromptHasher>"  # without the secret

    def hash_text(self, text: bytes) -> int:
        """The hash of a short text, such as the name of a session."""
        return hash(self._secret + text)

    def hash_prompt(self, key: Hashable, prompt: bytes) -> PromptPrint | None:
        """The print of a prompt in one step; ``None`` if the prompt has no whole block. For a large prompt use
        ``hash_pieces``. ``key``: the residency key (``base.ResidencyKey``)."""
        count = count_blocks(len(prompt))
        if count == 0:
            return None
        blocks = self._hash_blocks(self._first_link(key), memoryview(prompt), 0, BLOCK_ENDS[:count])
        return PromptPrint(tuple(blocks), len(prompt))

    def hash_pieces(self, key: Hashable, pieces: Sequence[Piece]) -> Generator[None, None, PromptPrint | None]:
        """The same print as ``hash_prompt`` makes of the joined pieces, in steps of at most ``STEP_BYTES``. It yields
        after each step, so that the caller can let other work run; the print is the generator's return value."""
        views = [memoryview(piece) for piece in pieces]
        size = sum(map(len, views))
        link, start = self._first_link(key), 0  # ``start``: the end of the last hashed block
        blocks: list[int] = []
        pending = bytearray()  # the bytes after ``start`` that have been read
        for view in views:
            for position in range(0, len(view), STEP_BYTES):
                pending += view[position : position + STEP_BYTES]
                ends = BLOCK_ENDS[len(blocks) : count_blocks(start + len(pending))]
                if ends:
                    blocks += self._hash_blocks(link, memoryview(bytes(pending)), start, ends)
                    link = blocks[-1]
                    del pending[: ends[-1] - start]
                    start = ends[-1]
                elif len(blocks) == len(BLOCK_ENDS):
                    pending.clear()  # the rest belongs to no block
                yield
        return PromptPrint(tuple(blocks), size) if blocks else None

    def _first_link(self, key: Hashable) -> int:
        """The number that replaces the hash of the previous block when the first block is hashed."""
        return hash((self._secret, key))

    def _hash_blocks(self, link: int, data: memoryview, start: int, ends: Sequence[int]) -> list[int]:
        """The hashes of the blocks with these ``ends``. ``data`` begins at byte ``start`` of the prompt, where the
        first of the blocks begins. ``link`` is the hash of the block before it."""
        secret = self._secret
        blocks: list[int] = []
        block_start = 0
        for end in ends:
            block_end = end - start
            link = hash(secret + link.to_bytes(8, "little", signed=True) + data[block_start:block_end])
            blocks.append(link)
            block_start = block_end
        return blocks


def print_from_ids(ids: Sequence[int], *, id_bytes: int, size: int) -> PromptPrint | None:
    """The print of a prompt from a public trace, which has an id for each ``id_bytes`` of the prompt in place of its
    text. Equal ids at the beginning of two prompts give equal blocks. ``None`` if there is no whole block."""
    # The hash of all ids up to each id. [1:] leaves out the initial 0.
    links = list(accumulate(ids, lambda link, block_id: hash((link, block_id)), initial=0))[1:]
    ends = BLOCK_ENDS[: count_blocks(min(size, len(links) * id_bytes))]
    # If a block ends inside the text of an id, it counts as equal if all ids up to this id are equal.
    blocks = tuple(hash((links[(end - 1) // id_bytes], end)) for end in ends)
    return PromptPrint(blocks, size) if blocks else None
