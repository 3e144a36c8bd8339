"""What is wrong with the bytes of a GGUF header."""

from __future__ import annotations


class GgufError(ValueError):
    """llama.cpp would not load a file with this header. The message says why, in words for people."""
