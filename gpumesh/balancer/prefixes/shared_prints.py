"""``SharedPromptHasher``: makes prints that gateways in other processes make too, if they have the same secret. Pure.

It uses BLAKE2b with the secret as its key. That takes four times as long as Python's own ``hash()`` (``prints.py``),
whose result is another one in each process: 30 us for a prompt of 10 KB. The secret goes over Redis. So whoever may
read there can test a guess of the first ``FIRST_BLOCK_BYTES`` of a prompt, but cannot read a prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import blake2b

from gpumesh.balancer.prefixes.prints import PromptHasher

HASH_BYTES = 8


class SharedPromptHasher(PromptHasher):
    """Prints that were made with different secrets cannot be compared."""

    __slots__ = ()

    @property
    def secret(self) -> bytes:
        return self._secret

    def replace_secret(self, secret: bytes) -> None:
        """Takes another secret for all later prints. A print that is being made meanwhile matches no other one."""
        self._secret = secret

    def _first_link(self, key: Hashable) -> int:
        return self._digest(repr(key).encode("utf-8", "surrogatepass"))

    def _hash_blocks(self, link: int, data: memoryview, start: int, ends: Sequence[int]) -> list[int]:
        secret = self._secret
        blocks: list[int] = []
        block_start = 0
        for end in ends:
            block_end = end - start
            hasher = blake2b(link.to_bytes(HASH_BYTES, "little", signed=True), digest_size=HASH_BYTES, key=secret)
            hasher.update(data[block_start:block_end])
            link = int.from_bytes(hasher.digest(), "little", signed=True)
            blocks.append(link)
            block_start = block_end
        return blocks

    def _digest(self, text: bytes) -> int:
        digest = blake2b(text, digest_size=HASH_BYTES, key=self._secret).digest()
        return int.from_bytes(digest, "little", signed=True)
