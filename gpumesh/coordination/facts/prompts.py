"""``PromptTeller``: collects the prompts that this gateway has sent, for the other gateways. Pure.

All gateways of a mesh make the hashes of prompts with one secret, or they could not compare them: that of the gateway
that began first. A gateway that takes it over tells it too, so it outlives that gateway.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.balancer.prefixes.prints import BLOCK_ENDS
from gpumesh.coordination.facts.messages import (
    MAX_MODEL_CHARS,
    MAX_OPTIONS,
    MAX_PROMPTS,
    MAX_TEXT_CHARS,
    PlacedPrompt,
    PlacedPrompts,
)

MIN_BLOCKS = 2  # a shorter prompt is read at once by any server
MAX_BLOCKS = 128  # the first 160 KiB: a server that has so much of a prompt is the best one for it
MAX_WAITING = 400  # prompts that wait to be told; with more, the oldest are not told
MAX_MESSAGE_BYTES = 40_000  # of the blocks in one message; as base64 they are a third longer


class PromptTeller:
    """The prompts that wait to be told. ``secret`` is the secret of their hashes."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._waiting: list[PlacedPrompt] = []

    def __repr__(self) -> str:
        return f"<PromptTeller {len(self._waiting)} wait>"  # without the secret

    def replace_secret(self, secret: bytes) -> None:
        """Takes over another secret. What waits was made with the old one, and is not told."""
        self.secret = secret
        self._waiting.clear()

    def add(self, server: str, key: ResidencyKey, prompt: PromptPrint) -> bool:
        """Adds a prompt that was sent to the server. Returns whether it will be told."""
        options = key.options
        is_told = (
            len(prompt.blocks) >= MIN_BLOCKS
            and len(key.model) <= MAX_MODEL_CHARS
            and len(options) <= MAX_OPTIONS
            and all(_is_plain(name) and _is_plain(value) for name, value in options)
            and len(self._waiting) < MAX_WAITING
        )
        if is_told:
            blocks = prompt.blocks[:MAX_BLOCKS]
            size = prompt.size if len(blocks) == len(prompt.blocks) else BLOCK_ENDS[len(blocks) - 1]
            packed = struct.pack(f"<{len(blocks)}q", *blocks)
            self._waiting.append(PlacedPrompt(server, key.model, key.context, options, size, packed))  # type: ignore[arg-type]
        return is_told

    def take_messages(self) -> Iterator[PlacedPrompts]:
        """Yields the messages that tell all that waits."""
        waiting, self._waiting = self._waiting, []
        part: list[PlacedPrompt] = []
        part_bytes = 0
        for prompt in waiting:
            if part and (len(part) >= MAX_PROMPTS or part_bytes + len(prompt.blocks) > MAX_MESSAGE_BYTES):
                yield PlacedPrompts(hash_secret(self.secret), tuple(part))
                part, part_bytes = [], 0
            part.append(prompt)
            part_bytes += len(prompt.blocks) + 2 * MAX_TEXT_CHARS
        if part:
            yield PlacedPrompts(hash_secret(self.secret), tuple(part))


def read_prompt(prompt: PlacedPrompt) -> tuple[ResidencyKey, PromptPrint] | None:
    """The prompt as the balancer knows it; ``None`` if it cannot be one."""
    count, rest = divmod(len(prompt.blocks), 8)
    if rest or not MIN_BLOCKS <= count <= MAX_BLOCKS or prompt.size < BLOCK_ENDS[count - 1]:
        return None
    blocks = struct.unpack(f"<{count}q", prompt.blocks)
    return ResidencyKey(prompt.model, prompt.context, prompt.options), PromptPrint(blocks, prompt.size)


def hash_secret(secret: bytes) -> str:
    """By this, messages name the secret with which they were made."""
    return blake2b(secret, digest_size=16, person=b"gpumesh-secret").hexdigest()


def _is_plain(value: object) -> bool:
    """Whether a part of an option can be in a message."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT_CHARS
    return value is None or isinstance(value, (bool, int, float))
