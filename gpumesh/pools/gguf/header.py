"""A model's shape from the first bytes of its GGUF file (llama.cpp's ggml/src/gguf.cpp, docs/gguf.md)."""

from __future__ import annotations

from dataclasses import dataclass

from gpumesh.pools.base import ModelShape


class GgufError(ValueError):
    """The bytes are no GGUF header that llama.cpp would load. The message says why, in words for people."""


@dataclass(frozen=True, slots=True)
class NeedsMore:
    """The header is longer than the bytes that were given. ``bytes``: how many to give next, from the file's start."""

    bytes: int


def parse_header(data: bytes, *, file_bytes: int | None = None) -> ModelShape | NeedsMore:
    """The shape of the model whose file starts with ``data``.

    Give 1 MiB first. After ``NeedsMore``, call again with so many bytes from the file's start (or the whole file, if it
    is shorter). ``file_bytes``: the file's size, if it is known: a file that is cut short is then refused.
    Raises GgufError.
    """
    raise NotImplementedError
